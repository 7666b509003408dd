"""The command line. Each command is a plain typed function; method options come from the registry.

Nothing heavy is imported here at the top: `quickspike --help` answers before torch would have loaded.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from quickspike.version import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType

    from quickspike.data import DataSet, Statistics
    from quickspike.method import Method

DEFAULT_METHOD = "threshold_balancing"

Help = tyro.conf.arg
ModelName = Annotated[
    str,
    tyro.conf.Positional,
    Help(metavar="MODEL", help="a registered name (digits_cnn), torchvision:NAME, timm:NAME, or FILE.py:FACTORY"),
]
Weights = Annotated[Path | None, Help(metavar="FILE", help="weights: safetensors, or .pt/.pth/.th read without running code")]
Json = Annotated[bool, Help(help="print JSON instead of tables")]
Device = Annotated[str, Help(metavar="NAME", help="auto, cpu, cuda, mps, ...")]


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which images, and how pixels become the network's input."""

    data: Annotated[str, Help(metavar="NAME", help="digits, mnist, fashion-mnist, cifar10, cifar100, imagefolder:PATH, or npz:PATH")]
    data_dir: Annotated[
        Path | None, Help(metavar="DIR", help="folder of torchvision's files (mnist, fashion-mnist, cifar10, cifar100)")
    ] = None
    mean: Annotated[
        tuple[float, ...] | None,
        Help(
            metavar="M", help="mean per channel of pixel/255 that the network was trained with [default: the data set's own, 0.5 for npz]"
        ),
    ] = None
    std: Annotated[tuple[float, ...] | None, Help(metavar="S", help="likewise, standard deviation")] = None
    download: Annotated[bool, Help(help="let torchvision fetch missing files")] = False

    def load(self, fallback: Statistics | None = None) -> DataSet:
        """The data set, normalised as asked, else by `fallback`, else by its own statistics."""
        from quickspike.data import Statistics, load_data
        from quickspike.errors import DataError

        if (self.mean is None) != (self.std is None):
            raise DataError("give both --mean and --std, or neither")
        if self.mean is not None and self.std is not None:
            if min(self.std, default=0) <= 0:
                raise DataError(f"--std must be > 0, got {self.std}")
            fallback = Statistics(self.mean, self.std)
        return load_data(self.data, self.data_dir, fallback, self.download)


DataArguments = Annotated[DataOptions, tyro.conf.OmitArgPrefixes]


def demo(out: Annotated[Path, Help(metavar="DIR", help="folder for what the demo makes")] = Path("runs/demo"), json: Json = False) -> None:
    """Train a small network on the embedded digits, convert it, compare both, save it and load it again."""
    from quickspike.files import check_writable

    check_writable(out / "network.safetensors")
    if not json:
        _show("training a small network on the embedded digits, then converting it ...")
    from quickspike.demo import run_demo
    from quickspike.report import accuracy_table

    result = run_demo(out, _track)
    if json:
        _print_json({name: report.to_json() for name, report in result.reports.items()})
        return
    _show(accuracy_table(result.reports))
    _show(f"saved and loaded again, same answers: {result.network}\npicture: {result.picture}")


def methods(
    name: Annotated[str | None, tyro.conf.Positional, Help(metavar="[NAME]", help="show all options of this method")] = None,
    json: Json = False,
) -> None:
    """List the conversion methods, or the options of one."""
    from quickspike.method import all_methods, get
    from quickspike.report import method_table, option_table, summary

    chosen = all_methods() if name is None else {name: get(name)}
    if json:
        _print_json([_method_json(cls, summary(cls)) for cls in chosen.values()])
    elif name is None:
        _show(method_table(chosen))
    else:
        _show(option_table(chosen[name]))


def _method_json(cls: type[Method], summary: str) -> dict[str, Any]:
    from quickspike.options import options_of

    options = {
        key: {
            "default": default,
            "unit": declared.unit,
            "range": declared.range_text(),
            "choices": list(getattr(kind, "__args__", ())),
            "help": declared.help,
        }
        for key, (declared, kind, default) in options_of(cls).items()
    }
    return {"name": cls.name, "summary": summary, "paper": str(cls.paper), "options": options}


def inspect(
    model: ModelName,
    input: Annotated[tuple[int, ...], Help(metavar="N", help="shape of one sample, for example 3 224 224 [default: 3 224 224]")] = (
        3,
        224,
        224,
    ),
    weights: Weights = None,
    json: Json = False,
) -> None:
    """Report what of a network converts, what stays analog and what is refused, before anything is changed."""
    import torch

    from quickspike.errors import DataError
    from quickspike.graph import inspect as inspect_model
    from quickspike.models import load_model
    from quickspike.report import coverage_tables

    if not input or min(input) < 1:
        raise DataError(f"--input must be sizes >= 1, got {input}")
    example = torch.rand(1, *input, generator=torch.Generator().manual_seed(0))
    coverage = inspect_model(load_model(model, weights), example)
    if json:
        _print_json(coverage.to_json())
    else:
        _show(coverage_tables(coverage))


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """What goes in, what comes out, and where it runs."""

    out: Annotated[Path, Help(metavar="FILE", help="the spiking network, safetensors")] = Path("network.safetensors")
    method: Annotated[
        str, Help(metavar="NAME", help="conversion method, see `quickspike methods`; the options shown are this method's")
    ] = DEFAULT_METHOD
    weights: Weights = None
    calibration_images: Annotated[
        int | None,
        Help(
            metavar="N",
            help="first N training images, without labels; by default 1000, or all if there are fewer [unit: images; range: >= 1]",
        ),
    ] = None
    device: Device = "auto"
    json: Json = False


def _convert_command(method: type[Method]) -> Callable[..., None]:
    """The `convert` command with the options of one method."""

    def convert(model: Any, data: Any, settings: Any, options: Any) -> None:
        """Convert a trained network with calibration images and save the spiking one."""
        _convert(model, data, settings, dataclasses.asdict(options))

    convert.__annotations__ = {
        "model": ModelName,
        "data": DataArguments,
        "settings": Annotated[ConvertOptions, tyro.conf.OmitArgPrefixes, Help(name="conversion")],
        "options": Annotated[_options_type(method), tyro.conf.OmitArgPrefixes, Help(name="method")],
    }
    return convert


def _options_type(method: type[Method]) -> type:
    from quickspike.options import options_of

    fields = [
        (name, Annotated[kind, Help(help=declared.describe())], dataclasses.field(default=default))
        for name, (declared, kind, default) in options_of(method).items()
    ]
    return dataclasses.make_dataclass("Options", fields, frozen=True, namespace={"__doc__": f"{method.name}: {method.paper}"})


def _convert(model: str, data: DataOptions, settings: ConvertOptions, options: dict[str, Any]) -> None:
    from quickspike.api import convert_traced
    from quickspike.data import ImageStream
    from quickspike.errors import DataError
    from quickspike.evaluation import make_fabric
    from quickspike.files import check_writable
    from quickspike.graph import trace
    from quickspike.method import create
    from quickspike.models import load_model

    chosen = create(settings.method, **options)
    check_writable(settings.out)
    source = make_fabric(settings.device).to_device(load_model(model, settings.weights))
    data_set = data.load()
    images = settings.calibration_images
    if images is None:
        images = min(1000, data_set.size("train"))
    if images < 1:
        raise DataError(f"--calibration-images must be >= 1, got {images}")
    stream = ImageStream(_Tracked(data_set.loader("train", limit=images), "calibrating"))
    traced = trace(source, stream.example)
    snn = convert_traced(traced, stream, chosen)
    statistics = dataclasses.asdict(data_set.statistics)
    snn.provenance.update(model=Path(model).name, data=Path(data.data).name, statistics=statistics)
    snn.save(settings.out)
    if settings.json:
        _print_json({"out": str(settings.out), "coverage": traced.coverage.to_json(), "method": snn.method, "provenance": snn.provenance})
    else:
        _show(f"{traced.coverage}\n{settings.method}, T = {snn.steps}, calibrated on {stream.samples} images: {settings.out}")


def evaluate(
    network: Annotated[Path, tyro.conf.Positional, Help(metavar="NETWORK", help="a spiking network that `convert` saved")],
    data: DataArguments,
    steps: Annotated[
        tuple[int, ...] | None,
        Help(metavar="T", help="numbers of steps to read out after [unit: steps; range: >= 1; default: 1 2 4 ... T]"),
    ] = None,
    reference: Annotated[str | None, Help(metavar="MODEL", help="the source network, to compare with")] = None,
    weights: Weights = None,
    images: Annotated[int | None, Help(metavar="N", help="first N test images [unit: images; default: all]")] = None,
    out: Annotated[Path | None, Help(metavar="FILE", help="also write the report as JSON")] = None,
    plot: Annotated[Path | None, Help(metavar="FILE", help="also draw accuracy against T, PNG")] = None,
    device: Device = "auto",
    precision: Annotated[str, Help(metavar="NAME", help="Lightning Fabric's name: 32-true, bf16-mixed, ...")] = "32-true",
    json: Json = False,
) -> None:
    """Measure a spiking network on test images: accuracy after each number of steps, and firing rates."""
    from quickspike.checkpoint import load
    from quickspike.errors import OptionError
    from quickspike.evaluation import evaluate as measure
    from quickspike.files import check_writable, write_text
    from quickspike.models import load_model
    from quickspike.report import plot_accuracy, report_tables

    for path in filter(None, (out, plot)):
        check_writable(path)
    snn = load(network)
    if weights is not None and reference is None:
        raise OptionError("--weights are those of the source network; name it with --reference")
    source = None if reference is None else load_model(reference, weights)
    data_set = data.load(_saved_statistics(snn.provenance.get("statistics")))
    loader = _Tracked(data_set.loader("test", limit=images), "evaluating")
    report = measure(snn, loader, source, steps, device=device, precision=precision)
    if out is not None:
        write_text(out, _dump(report.to_json()))
    if plot is not None:
        plot_accuracy({str(snn.method.get("name")): report}, plot)
    if json:
        _print_json(report.to_json())
    else:
        _show(report_tables(report))


def _saved_statistics(saved: Any) -> Statistics | None:
    """What `convert` kept; provenance is free-form, so it may also be something else."""
    from quickspike.data import Statistics
    from quickspike.errors import CheckpointError

    if saved is None:
        return None
    try:
        return Statistics(tuple(map(float, saved["mean"])), tuple(map(float, saved["std"])))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the network's own statistics are unusable ({saved!r}); give --mean and --std") from error


# Output


class _Tracked:
    """An iterable of known length whose passes show a progress bar."""

    def __init__(self, items: Any, what: str) -> None:
        self.items, self.what = items, what

    def __iter__(self) -> Any:
        return iter(_track(self.items, self.what))


def _track(items: Iterable[Any], what: str) -> Iterable[Any]:
    """Show a bar with progress, time taken and time left on stderr; nothing if that is not a terminal."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )

    def tracked() -> Iterable[Any]:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield from progress.track(items, description=what, total=_length(items))

    return tracked()


def _length(items: Any) -> int | None:
    return len(items) if hasattr(items, "__len__") else None


def _show(what: RenderableType) -> None:
    from rich.console import Console

    Console(soft_wrap=isinstance(what, str), highlight=False, markup=False).print(what)


def _dump(data: Any) -> str:
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def _print_json(data: Any) -> None:
    sys.stdout.write(_dump(data))


# Entry


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit status 0, 2 for a user's error, 130 for an interrupt."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        sys.stdout.write(f"quickspike {__version__}\n")
        return
    logging.basicConfig(format="quickspike: %(message)s", level=logging.WARNING)
    try:
        _dispatch(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has left (`| head`); the interpreter would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("\nquickspike: interrupted; no file was left half-written\n")
        sys.exit(130)
    except ValueError as error:
        if not _is_users(error):
            raise
        sys.stderr.write(f"quickspike: error: {error}\n")
        sys.exit(2)


def _dispatch(arguments: list[str]) -> None:
    commands: dict[str, Callable[..., None]] = {
        "demo": demo,
        "methods": methods,
        "inspect": inspect,
        "convert": _convert_stub,
        "evaluate": evaluate,
    }
    if arguments[:1] == ["convert"]:
        from quickspike.method import get

        commands["convert"] = _convert_command(get(_chosen_method(arguments)))
    tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="quickspike",
        description="Turn a trained PyTorch network into a spiking one that answers in a few time steps.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
        sort_subcommands=False,
    )


def _convert_stub() -> None:
    """Convert a trained network with calibration images and save the spiking one."""


def _chosen_method(arguments: list[str]) -> str:
    """The value of --method, read ahead of parsing because the options depend on it."""
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag.startswith("--method="):
            return flag.removeprefix("--method=")
        if flag == "--method":
            return value
    return DEFAULT_METHOD


def _is_users(error: ValueError) -> bool:
    from quickspike.errors import QuickspikeError

    return isinstance(error, QuickspikeError)
