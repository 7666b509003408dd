"""Sharing: a folder that holds a network and its model card, and the Hugging Face Hub, where such folders are kept.

The network file is the one of `quickspike.checkpoint`; nothing else in a folder or repository is read back. Folders are
loaded without huggingface_hub; everything else asks for it (`pip install 'quickspike[hub]'`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from quickspike.checkpoint import load
from quickspike.conversion import SpikingNetwork
from quickspike.energy import DEVICES, Energy
from quickspike.errors import CheckpointError, DataError, OptionError, QuickspikeError, UnknownNameError
from quickspike.evaluation import Report
from quickspike.files import OutputError, clear_abandoned, write_text
from quickspike.method import get, label
from quickspike.paper import Paper
from quickspike.refinement import REFINEMENTS
from quickspike.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

NETWORK = "network.safetensors"
CARD = "README.md"
CONFIG = "config.json"
PICTURE = "accuracy.png"
TAGS = ("spiking-neural-network", "ann-snn-conversion", "neuromorphic", "pytorch")
HUB_DATA_SETS = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet": "ILSVRC/imagenet-1k",
}
"""What the Hub calls the data sets of `quickspike.data`; it refuses headers with names that are none of its own."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+\Z", re.ASCII)

# Folders and repositories


def save_pretrained(
    snn: SpikingNetwork,
    folder: str | Path,
    report: Report | None = None,
    energy: Sequence[Energy] = (),
    *,
    name: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
    task: str | None = None,
) -> Path:
    """Write a folder with the network, its model card and, where the report has accuracies, a picture of them.

    An earlier save in the folder is replaced; other files in it stay. The parameters behind `snn` and `folder` are those
    of `model_card`.

    Returns:
        The folder.

    Raises:
        OutputError: the folder cannot be written, or holds a README.md or config.json of another origin.
        CheckpointError: the network cannot be saved.
        DataError: the report is of another network.
        QuickspikeError: huggingface_hub is not installed.
    """
    folder = Path(folder)
    _check_folder(folder)
    picture = _drawable(report)
    card = model_card(snn, report, energy, name=name, dataset=dataset, license=license, task=task, picture=picture)
    with _beside(folder) as made:
        _write(made, snn, report, card)
        _replace(made, folder)
    return folder


def from_pretrained(
    repo_or_folder: str | Path,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> SpikingNetwork:
    """The spiking network in a folder or in a repository of the Hub, bit for bit as saved, on the CPU, in evaluation mode.

    Args:
        repo_or_folder: what `save_pretrained` wrote, or "user/name" on the Hub; a folder of that name comes first.
        revision: branch, tag or commit of the repository; a commit gives the same network for ever.
        token: for private repositories; by default the one that `hf auth login` keeps.
        cache_dir: where downloads are kept; by default where huggingface_hub keeps them.
        force_download: download again what is there already.
        local_files_only: take what was downloaded before, and ask nobody.

    Raises:
        CheckpointError: no such folder, repository, revision or file, no connection, or a file that is damaged, altered
            or no quickspike network.
        OptionError: a revision of a folder.
        QuickspikeError: huggingface_hub is not installed, and it is no folder.
    """
    folder = Path(repo_or_folder)
    if folder.is_dir():
        return _from_folder(folder, revision)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; load it with quickspike.load, or name the folder that it is in")
    adapter, where = _adapter(), str(repo_or_folder)
    try:
        shared = adapter.from_pretrained(
            where,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
    except QuickspikeError as error:
        raise CheckpointError(f"{where}: {error}; if the download was damaged, repeat it with force_download=True") from error
    except Exception as error:
        raise CheckpointError(f"{where}: {_why_not_loaded(error, revision)}") from error
    network: SpikingNetwork = shared.network
    return network


def push_to_hub(
    snn: SpikingNetwork,
    repo_id: str,
    report: Report | None = None,
    energy: Sequence[Energy] = (),
    *,
    name: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
    task: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    message: str = "Upload a spiking network made with quickspike",
) -> str:
    """Upload what `save_pretrained` would write, in one commit; the repository is made if it is not there yet.

    Args:
        snn: not modified.
        repo_id: "user/name" or "organisation/name".
        report: this and what follows up to `task`, see `model_card`.
        energy: see above.
        name: see above.
        dataset: see above.
        license: see above.
        task: see above.
        private: who may see a repository that is made; None leaves it to the Hub's settings of its owner.
        token: with the right to write; by default the one that `hf auth login` keeps.
        branch: one that exists already; by default main.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        OptionError: repo_id names no owner.
        OutputError: no connection, no token, no right to write there.
        CheckpointError, DataError, QuickspikeError: as in `save_pretrained`; nothing was uploaded then.
    """
    if not _REPOSITORY.match(repo_id):
        raise OptionError(f"repo_id must name owner and repository, such as 'user/name', got {repo_id!r}")
    adapter, picture = _adapter(), _drawable(report)
    card = model_card(snn, report, energy, name=name, dataset=dataset, license=license, task=task, repo_id=repo_id, picture=picture)
    # Everything is written before the Hub hears of it: what cannot be saved leaves no empty repository behind.
    with tempfile.TemporaryDirectory(prefix="quickspike-") as made:
        _write(Path(made), snn, report, card)
        stale = None if picture else [PICTURE]
        try:
            shared = adapter(snn, Path(made))
            url = shared.push_to_hub(repo_id, private=private, token=token, branch=branch, commit_message=message, delete_patterns=stale)
        except Exception as error:
            raise OutputError(f"cannot push to {repo_id}: {_why_not_pushed(error, branch)}") from error
    return str(url)


def _from_folder(folder: Path, revision: str | None) -> SpikingNetwork:
    if revision is not None:
        raise OptionError(f"{folder} is a folder, which has no revisions; leave revision={revision!r} out")
    if not (folder / NETWORK).is_file():
        raise CheckpointError(f"{folder} holds no {NETWORK}; name a folder that save_pretrained wrote")
    return load(folder / NETWORK)


@functools.cache
def _adapter() -> Any:
    """The class through which huggingface_hub sees a network; made on first use, so that only those who share need it."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise _not_installed() from error

    class Shared(huggingface_hub.ModelHubMixin, library_name="quickspike"):
        """A network and the folder that it was written to."""

        def __init__(self, network: SpikingNetwork, folder: Path) -> None:
            self.network, self.folder = network, folder

        def _save_pretrained(self, save_directory: Path) -> None:
            shutil.copytree(self.folder, save_directory, dirs_exist_ok=True)

        # The mixin also passes on what stands in the repository's config.json, which is for readers only.
        @classmethod
        def _from_pretrained(
            cls,
            *,
            model_id: str,
            revision: str | None,
            cache_dir: str | Path | None,
            force_download: bool,
            local_files_only: bool,
            token: str | bool | None,
            **_: Any,
        ) -> Shared:
            path = huggingface_hub.hf_hub_download(
                model_id,
                NETWORK,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
            return cls(load(path), Path(path).parent)

    return Shared


def _not_installed() -> QuickspikeError:
    return QuickspikeError("sharing needs huggingface_hub, which is not installed; pip install 'quickspike[hub]'")


def _why_not_loaded(error: Exception, revision: str | None) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return "no folder of that name is here, and repositories of the Hub are called user/name"
    if isinstance(error, errors.GatedRepoError):
        return "access to this repository has to be asked for on its page; then log in (hf auth login), or give a token"
    if isinstance(error, errors.RepositoryNotFoundError):
        nowhere = "no folder of that name is here, and the Hub has no such repository"
        return f"{nowhere}, or it is private: log in (hf auth login), or give a token"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {revision!r}; name a branch, a tag or a commit of it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        where = "no folder of that name is here, it was not downloaded before"
        return f"{where}, and the Hub cannot be reached; give a folder, or try again with a connection"
    if isinstance(error, errors.EntryNotFoundError):
        return f"the repository holds no {NETWORK}; it was not made by push_to_hub"
    return _first_line(error)


def _why_not_pushed(error: Exception, branch: str | None) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no branch {branch!r}; make it first, or leave branch out"
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return "the Hub does not know who you are; log in (hf auth login), or give a token that may write"
    if status == 403:
        return "the token may not write there; give one that may, or a repository of your own"
    cut_off = "the Hub cannot be reached: " if isinstance(error, ConnectionError) else ""
    return f"{cut_off}{_first_line(error)}; save_pretrained writes the same to a folder, without a connection"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


# Writing


def _drawable(report: Report | None) -> bool:
    return report is not None and bool(report.accuracy)


def _write(folder: Path, snn: SpikingNetwork, report: Report | None, card: str) -> None:
    """Write all files into an empty folder."""
    snn.save(folder / NETWORK)
    config = {
        "library_name": "quickspike",
        "quickspike_version": __version__,
        "file": NETWORK,
        "method": _shown(snn.method),
        "steps": snn.steps,
        "input_shape": list(snn.input_shape),
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    if report is not None and report.accuracy:
        from quickspike.report import plot_accuracy

        plot_accuracy({label(snn.method): report}, folder / PICTURE)
    write_text(folder / CARD, card)


def _check_folder(folder: Path) -> None:
    """Raise OutputError rather than overwrite what somebody else wrote under the names of our files."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"cannot write {folder}: it is a file; name a folder")
    for name, mark in ((CARD, "library_name: quickspike"), (CONFIG, '"library_name": "quickspike"')):
        if (folder / name).exists() and mark not in _text_of(folder / name):
            raise OutputError(f"cannot write {folder}: it holds a {name} that quickspike did not write; name a folder of its own")


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """An empty folder on the same disk, gone in the end."""
    place = folder.absolute()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        clear_abandoned(place)
        made = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.", suffix=".part"))
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield made
    except OutputError as error:
        raise OutputError(str(error).replace(str(made), str(folder))) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _replace(made: Path, folder: Path) -> None:
    """Put the files in their place, one after the other: what speaks of a network is there only while that network is.

    The network itself is replaced at once, so that the folder can be loaded at any time.
    """
    try:
        folder.mkdir(exist_ok=True)
        # Without a file of ours there, a picture of that name is somebody else's.
        if (folder / CARD).exists() or (folder / CONFIG).exists():
            for name in (CARD, PICTURE, CONFIG):
                (folder / name).unlink(missing_ok=True)
        for name in (NETWORK, CONFIG, PICTURE, CARD):
            if (made / name).exists():
                (made / name).replace(folder / name)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error


# The card


def model_card(
    snn: SpikingNetwork,
    report: Report | None = None,
    energy: Sequence[Energy] = (),
    *,
    name: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
    task: str | None = None,
    repo_id: str | None = None,
    picture: bool = False,
) -> str:
    """The text of a README.md: a header that the Hub reads, then what was measured and how the network was made.

    It holds no figure that is not in `report` or `energy`, and no folder of this machine.

    Args:
        snn: not modified.
        report: what `quickspike.evaluate` measured of this network; without one the card says so.
        energy: what `quickspike.energy_of` gave for it, one entry for each device and account.
        name: heading of the card; by default source network, method and T.
        dataset: what the report was measured on, its name here ("cifar10") or on the Hub ("user/name"); by default the
            data set that the network was converted with, if it remembers one.
        license: the Hub's name of one, such as "apache-2.0"; left out by default, since it depends on source network and
            data.
        task: the Hub's name of what the network does; by default "image-classification" where a report on images has
            accuracies, else none. Figures are in the header only if there are a task and a data set.
        repo_id: the repository that the example loads from; by default the folder.
        picture: show the picture that lies beside the card.

    Raises:
        DataError: the report is of another network.
        QuickspikeError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import ModelCard, ModelCardData
    except ImportError as error:
        raise _not_installed() from error
    if report is not None:
        _check_report(snn, report)
    remembered = snn.provenance.get("data")
    about = _About(
        name=_without_folders(name or _usual_name(snn)).replace("\n", " "),
        dataset=_without_folders(dataset or (remembered if isinstance(remembered, str) else "")),
        task=task or ("image-classification" if _drawable(report) and len(snn.input_shape) == 3 else None),
    )
    results = _results(report, about)
    identifier = _hub_id(about.dataset)
    header = ModelCardData(
        library_name="quickspike",
        license=license,
        pipeline_tag=about.task,
        tags=[*TAGS, *filter(None, [_method_name(snn)])],
        datasets=[identifier] if identifier else None,
        metrics=["accuracy"] if _drawable(report) else None,
        model_name=about.name if results else None,
        eval_results=results or None,
    )
    sections = (
        f"# {_inline(about.name)}",
        _lead(snn, report),
        _use(snn, repo_id),
        _accuracy(report, about, picture),
        _rates(report),
        _costs(energy),
        _origin(snn),
        _limits(snn),
        _citation(snn),
    )
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"))


@dataclass(frozen=True)
class _About:
    """What the caller or the network's past says of it."""

    name: str
    dataset: str
    task: str | None


def _check_report(snn: SpikingNetwork, report: Report) -> None:
    """Raise DataError if the report cannot be of this network."""
    # As plain data: a loaded network has lists where the one that was measured had tuples.
    if json.dumps(report.method, sort_keys=True) != json.dumps(snn.method, sort_keys=True):
        reason = f"its method is {report.method}, the network's {snn.method}"
    elif set(report.rates) != {site.name for site in snn.sites}:
        reason = f"its sites are {', '.join(report.rates)}, the network's {', '.join(site.name for site in snn.sites)}"
    else:
        return
    raise DataError(f"the report is of another network: {reason}; evaluate the network that is saved")


def _results(report: Report | None, about: _About) -> list[EvalResult]:
    """The accuracy after each number of steps, for the header."""
    from huggingface_hub import EvalResult

    if report is None or about.task is None or not about.dataset:
        return []
    return [
        EvalResult(
            task_type=about.task,
            dataset_type=_hub_id(about.dataset) or about.dataset,
            dataset_name=about.dataset,
            metric_type="accuracy",
            metric_name=f"accuracy in % after T = {step} steps",
            metric_value=value,
            metric_args={"steps": step},
        )
        for step, value in report.accuracy.items()
    ]


def _hub_id(dataset: str) -> str | None:
    return HUB_DATA_SETS.get(dataset) or (dataset if _REPOSITORY.match(dataset) else None)


def _method_name(snn: SpikingNetwork) -> str:
    return str(snn.method.get("name", ""))


def _way(snn: SpikingNetwork) -> str:
    """The method and its refinements; in code outside of a table a bar cannot be escaped."""
    refined = [_code(part) for part in label(snn.method).split(" | ")[1:]]
    return f"the method {_code(_method_name(snn))}" + (f", refined by {' and '.join(refined)}," if refined else "")


def _usual_name(snn: SpikingNetwork) -> str:
    source = snn.provenance.get("model") or snn.provenance.get("source") or "spiking network"
    return f"{source}, {label(snn.method)}, T = {snn.steps}"


def _lead(snn: SpikingNetwork, report: Report | None) -> str:
    source = snn.provenance.get("model") or snn.provenance.get("source")
    made = f", converted from {_code(source)}" if source else ""
    text = f"A spiking network{made} with {_way(snn)} of quickspike. It answers after T = {snn.steps} time steps."
    if report is None or snn.steps not in report.accuracy:
        return text
    text += f" Accuracy after these: {report.accuracy[snn.steps]:.2f} % of {report.samples} images"
    return text + ("." if report.reference_accuracy is None else f"; the source network has {report.reference_accuracy:.2f} %.")


def _use(snn: SpikingNetwork, repo_id: str | None) -> str:
    where = "" if repo_id else "  # this folder, or user/name of the repository that it was pushed to"
    shape = ", ".join(map(str, ("B", *snn.input_shape)))
    code = f"""import quickspike as qs

snn = qs.from_pretrained({json.dumps(repo_id or ".")}){where}
answer = snn(images)  # images: [{shape}]
run = snn.run(images)  # the answer after every step, and the spikes of every site"""
    parts = ["## Use", "`pip install 'quickspike[hub]'`, then", _block(code, "python")]
    parts.append("`revision=` takes a commit, which pins the network. The file holds no pickle and no code, and its checksum is verified.")
    preprocessing = snn.provenance.get("preprocessing")
    if isinstance(preprocessing, Mapping) and preprocessing:
        parts += ["Images are prepared as they were for the source network, pixels in [0, 1]:", _settings(preprocessing)]
    return "\n\n".join(parts)


def _accuracy(report: Report | None, about: _About, picture: bool) -> str:
    if report is None:
        code = """report = qs.evaluate(snn, test_images_with_labels, reference=source_network)
qs.save_pretrained(snn, folder, report)"""
        return f"## Accuracy\n\nNot measured: the network was saved without a report. To make one:\n\n{_block(code, 'python')}"
    columns: dict[str, Mapping[int, str]] = {
        "accuracy %": {step: f"{value:.2f}" for step, value in report.accuracy.items()},
        "same class as source %": {step: f"{value:.2f}" for step, value in report.agreement.items()},
        "off the source's output %": {step: f"{value:.1f}" for step, value in report.deviation.items()},
        "latency in steps": {step: str(value) for step, value in report.latency.items()},
    }
    columns = {heading: values for heading, values in columns.items() if values}
    rows = [[f"T = {step}", *(values.get(step, "") for values in columns.values())] for step in report.steps]
    if report.reference_accuracy is not None:
        rows.append(["source network", f"{report.reference_accuracy:.2f}", *[""] * (len(columns) - 1)])
    of = f" of {_code(about.dataset)}" if about.dataset else ""
    parts = ["## Accuracy", f"Measured on {report.samples} images{of}, after each number of time steps T."]
    if report.members > 1:
        parts.append(f"With groups of {report.members} neurons in place of single ones.")
    if picture:
        parts.append(f"![accuracy against T]({PICTURE})")
    parts += [_table(["", *columns], rows), _explained(columns)]
    return "\n\n".join([*parts, _inline(_without_folders(_measured(report)))])


def _explained(columns: Mapping[str, Any]) -> str:
    meanings = {
        "same class as source %": "same class: share of the labels on which spiking and source network choose the same one",
        "off the source's output %": "off: root mean square distance from the source network's output, relative to that output",
        "latency in steps": "latency: steps until the answer is there, more than T where layers wait for whole windows",
    }
    return "\n".join(f"- {meaning}" for heading, meaning in meanings.items() if heading in columns)


def _measured(report: Report) -> str:
    known = {key: report.settings[key] for key in ("device", "precision") if report.settings.get(key)}
    known |= report.settings.get("versions") or {}
    listed = ", ".join(f"{key} {value}" for key, value in known.items())
    return f"Measured with {listed}; {report.engine}." if listed else f"{report.engine[0].upper()}{report.engine[1:]}."


def _rates(report: Report | None) -> str:
    if report is None:
        return ""
    rows = [[_code(site), f"{rate:.4f}"] for site, rate in report.rates.items()]
    lead = f"Spikes per neuron and step, mean over T = {report.steps[-1]} steps and {report.samples} images."
    return f"## Spike rates\n\n{lead}\n\n{_table(['site', 'rate'], rows)}"


def _costs(energy: Sequence[Energy]) -> str:
    if not energy:
        code = """operations = qs.count_operations(snn, images)
qs.save_pretrained(snn, folder, report, energy=[qs.energy_of(operations, "45nm_fp32")])"""
        return f"## Energy\n\nNot counted. To do so:\n\n{_block(code, 'python')}"
    rows = [[_code(one.device), one.account, f"{one.source / 1e3:,.1f}", f"{one.spiking / 1e3:,.1f}", f"{one.ratio:.2f}"] for one in energy]
    table = _table(["device", "account", "source network", "spiking", "source / spiking"], rows)
    sources = [f"figures of {name}: {DEVICES[name].source}" for name in dict.fromkeys(one.device for one in energy) if name in DEVICES]
    lead = "Estimates from counted operations, in nJ per image; not measured on hardware. What they leave out:"
    return f"## Energy\n\n{table}\n\n{lead}\n\n{_list([*_caveats(energy), *sources])}"


def _caveats(energy: Sequence[Energy]) -> list[str]:
    """Each once, with the rows that it is about unless it is about all."""
    found = {caveat: [one for one in energy if caveat in one.caveats] for one in energy for caveat in one.caveats}
    return [
        caveat if len(rows) == len(energy) else f"{caveat} ({', '.join(f'{one.device} {one.account}' for one in rows)})"
        for caveat, rows in found.items()
    ]


def _origin(snn: SpikingNetwork) -> str:
    from quickspike.cli_options import commands_of

    parts = ["## How it was made", f"Method {_code(_method_name(snn))} with these options:"]
    parts.append(_settings(snn.method.get("options") or {}))
    for one in snn.method.get("refinements", ()):
        parts += [f"Refined by {_code(str(one.get('name')))} with these options:", _settings(one.get("options") or {})]
    facts = {key: value for key, value in snn.provenance.items() if key not in ("made", "preprocessing")}
    if facts:
        parts += ["From these, with these versions:", _settings(facts)]
    parts += ["Commands:", _block(_without_folders(commands_of(snn, NETWORK)), "sh")]
    return "\n\n".join(parts)


def _limits(snn: SpikingNetwork) -> str:
    options = snn.method.get("options") or {}
    fitted = options.get("steps", snn.steps) if isinstance(options, Mapping) else snn.steps
    found = [
        "T is the number of time steps that every input is shown for, unchanged from step to step; each further step costs more.",
        f"Thresholds were fitted for T = {fitted}. `snn.with_steps(T)` runs for another number, with the same thresholds.",
        f"Readout: the last layer does not spike. The answer after t steps is the mean of its outputs up to t{_fading(snn)}.",
        "Figures hold for the images that they were measured on. What source network and data cannot do, this network cannot either.",
    ]
    if not any(site.encodes_input for site in snn.sites):
        found.append("Layers in front of the first spikes read real values and multiply.")
    if any(neuron.averaged for neuron in snn.neurons().values()):
        found.append("Layers wait for the whole window of the layer before: the answer takes depth x T steps.")
    if snn.weighted:
        found.append(
            "The spike of step t counts 2^(T-t) times as much as the last one, as in radix encoding (Wang et al. 2021, "
            "[arXiv 2105.06943](https://arxiv.org/abs/2105.06943)): hardware has to shift what it brings."
        )
    if snn.members > 1:
        found.append(
            f"Where the source network has one neuron there is a group of {snn.members}, as in Lv et al. 2024 "
            "([arXiv 2402.19061](https://arxiv.org/abs/2402.19061)): hardware has to have that many times the neurons."
        )
    runs = {neuron.first_run for neuron in snn.neurons().values() if neuron.first_run}
    for kind, steps in sorted(runs):
        what = (
            "every layer runs them ahead, and is as many behind the one before"
            if kind == "shift"
            else "they decide which neurons are heard after"
        )
        found.append(f"Neurons go through the first {steps} steps twice: {what}.")
    if any(neuron.signed for neuron in snn.neurons().values()):
        found.append("Neurons take spikes back, as spikes of -1: hardware has to have them.")
    if analog := snn.provenance.get("analog"):
        found.append(f"Computed on real values at every step: {_code(_shown(analog))}.")
    return f"## Limits\n\n{_list(found, raw=True)}"


def _fading(snn: SpikingNetwork) -> str:
    return "" if snn.readout_leak is None else f", that of step s weighted by {snn.readout_leak:g}^(t-s): a leaky integrator"


def _citation(snn: SpikingNetwork) -> str:
    try:
        papers = [get(_method_name(snn)).paper, *(REFINEMENTS.get(one["name"]).paper for one in snn.method.get("refinements", ()))]
    except UnknownNameError:
        return f"## Citation\n\nThe method {_code(_method_name(snn))} is none that comes with quickspike; its paper is not known here."
    of = [f"{_inline(paper.authors)} ({paper.year}), [{paper.where}]({paper.address})" for paper in papers]
    entries = _block("\n\n".join(map(_bibtex, papers)), "bibtex")
    return f"## Citation\n\nThe method is that of {', refined as in '.join(of)}.\n\n{entries}"


def _bibtex(paper: Paper) -> str:
    """The entry; its key is the first author's last name, the year and the first word of the title."""
    authors = paper.authors.removesuffix(" et al.").split(", ")
    if paper.authors.endswith(" et al."):
        authors.append("others")
    word = next((word for word in re.findall(r"[a-z]+", paper.title.lower()) if word not in ("a", "an", "the", "can", "on")), "")
    last = re.sub(r"[^a-z]", "", authors[0].rpartition(" ")[2].lower())
    escaped = re.sub(r"([&%$#_])", r"\\\1", paper.title)
    where = {"eprint": paper.arxiv, "archivePrefix": "arXiv"} if paper.arxiv else {"howpublished": paper.venue, "url": paper.page}
    fields = {"title": f"{{{escaped}}}", "author": " and ".join(authors), "year": paper.year, **where}
    lines = "\n".join(f"  {key:13} = {{{value}}}," for key, value in fields.items())
    return f"@misc{{{last}{paper.year}{word},\n{lines}\n}}"


# Text


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> str:
    """Markdown; the first column to the left, the others to the right unless they are words."""
    lines = [headings, ["---", *["---" if words else "--:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _settings(values: Mapping[str, Any]) -> str:
    return _table(["", "value"], [[_code(_shown(key)), _code(_shown(value))] for key, value in sorted(values.items())], words=True)


def _list(items: Sequence[str], raw: bool = False) -> str:
    return "\n".join(f"- {item if raw else _inline(item)}" for item in items)


def _block(text: str, language: str) -> str:
    """A block of code that its content cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _code(text: Any) -> str:
    """A value as it stands: nothing in it is markup."""
    plain = _without_folders(_compact(text))
    return "`" + " ".join(plain.replace("`", "'").split()).replace("|", "\\|") + "`" if plain else ""


def _inline(text: str) -> str:
    """Words in which nothing is markup but what people write in words."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(text.split()))


def _compact(value: Any) -> str:
    """Plain data in a line: names with one value each as words, everything else as JSON."""
    if isinstance(value, Mapping) and value and not any(isinstance(item, (Mapping, list, tuple)) for item in value.values()):
        return ", ".join(f"{key} {_compact(item)}" for key, item in sorted(value.items()))
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _shown(value: Any) -> Any:
    """Plain data without the folders of this machine."""
    if isinstance(value, str):
        return _without_folders(value)
    if isinstance(value, Mapping):
        return {_without_folders(str(key)): _shown(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(item) for item in value]
    return value


_ROOT = r"(?:~\w*/|(?:file://)?/|(?<!\w)[A-Za-z]:[\\/])"
_QUOTED = re.compile(rf"""(['"])([\w:=-]*?){_ROOT}[^'"\n]*\1""")
_BARE = re.compile(rf"""(?<![\w./\\~]){_ROOT}(?![/\s])[^\s'",;)\]}}]+""")


def _without_folders(text: str) -> str:
    """Of absolute paths only the last part, as `quickspike.cli_options.without_paths` leaves of those on a command line."""
    if re.match(_ROOT, text) and "\n" not in text:
        return _last(text)
    text = _QUOTED.sub(lambda found: f"{found[1]}{found[2]}{_last(found[0][1:-1])}{found[1]}", text)
    return _BARE.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    # Windows' rules take both kinds of slashes.
    return PureWindowsPath(path).name
