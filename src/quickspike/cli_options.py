"""Arguments that several commands share."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from quickspike.choosing import Attempt, Auto
    from quickspike.conversion import SpikingNetwork
    from quickspike.data import DataSet
    from quickspike.method import Method
    from quickspike.searching import Candidate

Help = tyro.conf.arg
ModelName = Annotated[
    str,
    tyro.conf.Positional,
    Help(metavar="MODEL", help="a registered name (fast_cnn or fast_cnn,classes=100), torchvision:NAME, timm:NAME, or FILE.py:FACTORY"),
]
Refine = Annotated[
    tuple[str, ...],
    Help(metavar="NAME", help="what follows the conversion, in order, see `quickspike methods`; with options: NAME:rate=0.5,passes=4"),
]
Weights = Annotated[
    Path | None,
    Help(
        metavar="FILE",
        help="weights: safetensors, or .pt/.pth/.th read without running code; or the word pretrained: those of torchvision or timm, "
        "with the preprocessing that goes with them",
    ),
]
Json = Annotated[bool, Help(help="print JSON instead of tables")]
Device = Annotated[str, Help(metavar="NAME", help="auto, cpu, cuda, mps, ...")]


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which images, and how pixels become the network's input."""

    data: Annotated[
        str, Help(metavar="NAME", help="digits, mnist, fashion-mnist, cifar10, cifar100, imagenet, imagefolder:PATH, or npz:PATH")
    ]
    data_dir: Annotated[
        Path | None,
        Help(
            metavar="DIR", help="folder of torchvision's files (mnist, fashion-mnist, cifar10, cifar100), or of the folders train and val"
        ),
    ] = None
    mean: Annotated[
        tuple[float, ...] | None,
        Help(
            metavar="M", help="mean per channel of pixel/255 that the network was trained with [default: the data set's own, 0.5 for npz]"
        ),
    ] = None
    std: Annotated[tuple[float, ...] | None, Help(metavar="S", help="likewise, standard deviation")] = None
    resize: Annotated[
        int | None,
        Help(metavar="N", help="shorter side of the pictures [unit: pixels; default: 256 for pictures in files, else as they are]"),
    ] = None
    center_crop: Annotated[
        int | None, Help(metavar="N", help="side of the square cut out of the middle [unit: pixels; default: 224 for files, else all]")
    ] = None
    bgr: Annotated[bool, Help(help="blue first, in --mean and --std too")] = False
    download: Annotated[bool, Help(help="let torchvision fetch missing files")] = False
    workers: Annotated[int, Help(metavar="N", help="processes that read pictures from files [range: >= 0]")] = 0

    def load(self, saved: Any = None, model: str | None = None, weights: Path | None = None) -> DataSet:
        """The data set, prepared as asked, else as `saved` with a network or as its pretrained weights ask, else as usual for it."""
        from quickspike.data import load_data
        from quickspike.errors import DataError
        from quickspike.models import is_pretrained, preprocessing_of
        from quickspike.preprocessing import PREPROCESSING

        if (self.mean is None) != (self.std is None):
            raise DataError("give both --mean and --std, or neither")
        if self.std is not None and min(self.std, default=0) <= 0:
            raise DataError(f"--std must be > 0, got {self.std}")
        if self.workers < 0:
            raise DataError(f"--workers must be >= 0, got {self.workers}")
        base = _saved_preprocessing(saved)
        if base is None and model is not None and is_pretrained(weights):
            base = preprocessing_of(model)
        base = base or PREPROCESSING.get(self.data.partition(":")[0])
        asked = {"mean": self.mean, "std": self.std, "resize": self.resize, "crop": self.center_crop, "bgr": self.bgr or None}
        given = {name: value for name, value in asked.items() if value is not None}
        return load_data(self.data, self.data_dir, base and dataclasses.replace(base, **given), self.download, self.workers)


def _saved_preprocessing(saved: Any) -> Any:
    """What a network was saved with; provenance is free-form, so it may also be something else."""
    from quickspike.errors import CheckpointError, DataError
    from quickspike.preprocessing import Preprocessing

    if saved is None:
        return None
    try:
        return Preprocessing.from_json(saved)
    except (DataError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"the network's own preprocessing is unusable ({saved!r}); give --mean and --std") from error


DataArguments = Annotated[DataOptions, tyro.conf.OmitArgPrefixes]


def options_type(owner: type, taken: Collection[str] = (), **defaults: Any) -> type:
    """A dataclass for tyro with the declared options of `owner`, their help, and some defaults replaced.

    An option whose name is `taken` by another of the same command is called --method-NAME.
    """
    from quickspike.options import options_of

    def flag(name: str) -> str | None:
        return f"method-{name.replace('_', '-')}" if name in taken else None

    fields = [
        (name, Annotated[kind, Help(help=declared.describe(), name=flag(name))], dataclasses.field(default=defaults.get(name, default)))
        for name, (declared, kind, default) in options_of(owner).items()
    ]
    doc = (owner.__doc__ or "").strip().splitlines()[0]
    return dataclasses.make_dataclass("Options", fields, frozen=True, namespace={"__doc__": doc})


AUTO = "auto"
"""Instead of a method's name: what measures best."""


def method_options(name: str, taken: Collection[str] = ()) -> type:
    """The options of a method, with its paper as their title, or of the choice of one."""
    from quickspike.method import get

    if name == AUTO:
        from quickspike.choosing import Auto

        return options_type(Auto, taken)
    method = get(name)
    kind = options_type(method, taken)
    kind.__doc__ = f"{method.name}: {method.paper}"
    return kind


def auto_of(name: str | None, options: dict[str, Any], refine: Collection[str], choices: SiteChoices | None = None) -> Auto | None:
    """What `--method auto` may make use of; None for any other method.

    Raises:
        OptionError: what auto chooses itself is given, too.
    """
    from quickspike.errors import OptionError

    if name != AUTO:
        return None
    from quickspike.choosing import Auto

    if refine or (choices is not None and choices.at):
        raise OptionError("--method auto chooses refinements and options itself; leave --refine and --at out, or name a method")
    return Auto(**options)


def tell_attempt(attempt: Attempt) -> None:
    """A line for each combination that was measured."""
    sys.stderr.write(f"{attempt.what}: {attempt.measured:.2f} %, {attempt.seconds:.0f} s\n")


@dataclasses.dataclass(frozen=True)
class Choices:
    """What becomes of single operators and sites."""

    analog: Annotated[
        tuple[str, ...],
        Help(metavar="PATTERN", help="names or operators to compute on real values at every step, for example 'head.*' LayerNorm"),
    ] = ()
    pieces: Annotated[
        int, Help(metavar="N", help="straight lines, a group of neurons each, in place of a smooth activation [range: 2 to 64]")
    ] = 16


@dataclasses.dataclass(frozen=True)
class SiteChoices(Choices):
    """The same where a method is at hand."""

    at: Annotated[
        tuple[str, ...],
        Help(metavar="PATTERN:OPTION=VALUE", help="an option of the method at some sites only, for example 'layer1.*:initial=0'"),
    ] = ()

    def sites(self, method: type[Method]) -> dict[str, dict[str, Any]]:
        """Options by pattern, as methods take them."""
        from quickspike.errors import OptionError
        from quickspike.options import parsed

        found: dict[str, dict[str, Any]] = {}
        for text in self.at:
            match = re.fullmatch(r"([^:]+):(\w+)=(.*)", text)
            if match is None:
                raise OptionError(f"--at takes PATTERN:OPTION=VALUE, got {text!r}")
            found.setdefault(match[1], {})[match[2]] = parsed(method, match[2], match[3])
        return found


def candidate_of(text: str) -> Candidate:
    """A candidate of a search from METHOD or METHOD:OPTION=VALUE,OPTION=VALUE, with refinements behind bars.

    Raises:
        UnknownNameError: no such method or refinement.
        OptionError: it is written otherwise, there is no such option, or its value is of another kind.
    """
    from quickspike.errors import OptionError
    from quickspike.method import get
    from quickspike.options import named
    from quickspike.refinement import refinements_of
    from quickspike.searching import Candidate

    first, *others = text.split("|")
    method, options = named(first, get)
    if "steps" in options:
        raise OptionError(f"--candidate {text}: steps is what is searched for; bound it with --most-steps")
    return Candidate(method.name, {**options, **({"refinements": refinements_of(others)} if others else {})})


SiteArguments = Annotated[SiteChoices, tyro.conf.OmitArgPrefixes]
ChoiceArguments = Annotated[Choices, tyro.conf.OmitArgPrefixes]


def without_paths(arguments: list[str]) -> list[str]:
    """Arguments as they would be given elsewhere: of absolute paths only the last part, also in --out=/a/b and npz:/a/b."""
    return [re.sub(r"^(--[\w-]+=|)(npz:|imagefolder:|)/(?:.*/)?([^/]+)/?$", r"\1\2\3", text) for text in arguments]


def typed() -> str:
    """The command, without the folders of whoever typed it."""
    return f"quickspike {shlex.join(without_paths(sys.argv[1:]))}"


def remember_command(snn: SpikingNetwork, before: str = "") -> None:
    """Keep in a network the commands that made it; `before` this one there may be others, a line each.

    With the digest a page can tell whether they alone did.
    """
    from quickspike.provenance import digest

    by = f"{before}\n{typed()}" if before else typed()
    snn.provenance["made"] = {"by": by, "digest": digest(value for _, value in sorted(snn.state_dict().items()))}


def commands_of(snn: SpikingNetwork, name: str) -> str:
    """The commands that made a network, or why there is none to repeat."""
    from quickspike.provenance import digest

    made = snn.provenance.get("made")
    if not isinstance(made, dict) or "by" not in made:
        return f"# {name} was made in Python; its method and settings are below"
    commands = str(made["by"])
    if made.get("digest") != digest(value for _, value in sorted(snn.state_dict().items())):
        return f"{commands}\n# ... and {name} was changed afterwards, in Python"
    return commands
