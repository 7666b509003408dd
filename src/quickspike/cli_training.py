"""The commands that train or convert several times: train, tune, run, compare and search. Like the others, plain typed functions."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from quickspike.cli_options import DataArguments, DataOptions, Json, ModelName, Weights, method_options, options_type, without_paths
from quickspike.console import Tracked, TrainingWatcher, print_json, show

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

    from quickspike.augmentation import Augmentation
    from quickspike.conversion import SpikingNetwork
    from quickspike.data import DataSet
    from quickspike.evaluation import Report
    from quickspike.page import Entry
    from quickspike.training import Trainer, Training
    from quickspike.tuning import Tuning

Help = tyro.conf.arg
TUNING: dict[str, Any] = {"optimiser": "adam", "learning_rate": 1e-4, "weight_decay": 0.0, "schedule": "cosine"}
"""Settings of fine-tuning where the user gives none (arXiv 2008.03658, section IV: Adam at 1e-4)."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Where a training runs."""

    device: Annotated[str, Help(metavar="NAME", help="auto, cpu, cuda, mps, ...")] = "auto"
    devices: Annotated[int, Help(metavar="N", help="processes on this machine, one device each [unit: devices; range: >= 1]")] = 1
    nodes: Annotated[int, Help(metavar="N", help="machines; start the same command on each with torchrun [range: >= 1]")] = 1
    strategy: Annotated[str, Help(metavar="NAME", help="Lightning Fabric's name: auto, ddp, fsdp, ...")] = "auto"
    precision: Annotated[
        str | None, Help(metavar="NAME", help="Lightning Fabric's name: 32-true, bf16-mixed, ... [default: the recipe's, else 32-true]")
    ] = None

    def launch(self, recipe_precision: str = "32-true") -> Fabric:
        """The processes, started."""
        from quickspike.evaluation import make_fabric

        fabric = make_fabric(self.device, self.precision or recipe_precision, self.devices, self.nodes, self.strategy)
        fabric.launch()
        return fabric


@dataclasses.dataclass(frozen=True)
class TrainingFiles:
    """What comes out, and going on with it."""

    out: Annotated[Path, Help(metavar="DIR", help="folder for the network, checkpoints and figures of the training")] = Path("runs/train")
    resume: Annotated[bool, Help(help="go on where an interrupted training in the same folder stopped")] = False
    tensorboard: Annotated[bool, Help(help="also write figures for TensorBoard")] = False
    json: Json = False


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Whose answers the network learns, with --distill."""

    teacher: Annotated[
        str | None,
        Help(metavar="MODEL", help="network whose answers are learned (--distill), named like MODEL [default: train: the source network]"),
    ] = None
    teacher_weights: Annotated[Path | None, Help(metavar="FILE", help="its weights, as for --weights")] = None

    def load(self, distill: float) -> nn.Module | None:
        """The network; None if none is named."""
        from quickspike.errors import OptionError
        from quickspike.models import load_model

        if self.teacher is not None and not distill:
            raise OptionError("--teacher does nothing without --distill, the share of the loss that its answers have")
        return None if self.teacher is None else load_model(self.teacher, self.teacher_weights)


def _trainer(
    data: DataSet, settings: Training, augmentation: Augmentation, hardware: Hardware, files: TrainingFiles, teacher: Teacher
) -> Trainer:
    from quickspike.training import Trainer, start_anew

    fabric = hardware.launch()
    if not files.resume and fabric.is_global_zero:
        start_anew(files.out)
    fabric.barrier()
    return Trainer(
        fabric=fabric,
        data=data,
        settings=settings,
        augmentation=augmentation,
        folder=files.out,
        resume=files.resume,
        watcher=TrainingWatcher(quiet=not fabric.is_global_zero),
        tensorboard=files.tensorboard,
        teacher=teacher.load(settings.distill),
    )


def _flat(kind: Any, name: str) -> Any:
    return Annotated[kind, tyro.conf.OmitArgPrefixes, Help(name=name)]


@dataclasses.dataclass(frozen=True)
class Source:
    """What the training starts from."""

    method: Annotated[
        str | None, Help(metavar="NAME", help="train with this method's activations and convert; without it: plain training of the network")
    ] = None
    weights: Weights = None
    calibration_images: Annotated[
        int, Help(metavar="N", help="first N training images, without labels, that a method is calibrated on [unit: images; range: >= 1]")
    ] = 1000


def train_command(method: str | None) -> Callable[..., None]:
    """The `train` command with all settings of a training, and the options of the method if one is named."""
    from quickspike.augmentation import Augmentation
    from quickspike.method import get
    from quickspike.training import Training

    def train(
        model: Any, data: Any, source: Any, files: Any, training: Any, teacher: Any, augmentation: Any, hardware: Any, options: Any
    ) -> None:
        """Train a source network, plainly or with a method's activations; with a method, convert it too."""
        settings, drawn = Training(**dataclasses.asdict(training)), Augmentation(**dataclasses.asdict(augmentation))
        _train(model, data, source, files, settings, teacher, drawn, hardware, {} if options is None else dataclasses.asdict(options))

    train.__annotations__ = {
        "model": ModelName,
        "data": DataArguments,
        "source": _flat(Source, "source"),
        "files": _flat(TrainingFiles, "files"),
        "training": _flat(options_type(Training), "training"),
        "teacher": _flat(Teacher, "teacher"),
        "augmentation": _flat(options_type(Augmentation), "augmentation"),
        "hardware": _flat(Hardware, "hardware"),
        "options": _flat(method_options(get(method)) if method else type(None), "method"),
    }
    if method is None:
        # tyro would show an argument that can only be None.
        return _without_options(train)
    return train


def _without_options(train: Callable[..., None]) -> Callable[..., None]:
    def plain(model: Any, data: Any, source: Any, files: Any, training: Any, teacher: Any, augmentation: Any, hardware: Any) -> None:
        train(model, data, source, files, training, teacher, augmentation, hardware, None)

    plain.__doc__ = train.__doc__
    plain.__annotations__ = {name: kind for name, kind in train.__annotations__.items() if name != "options"}
    return plain


def _train(
    model: str,
    data: DataOptions,
    source: Source,
    files: TrainingFiles,
    settings: Training,
    teacher: Teacher,
    augmentation: Augmentation,
    hardware: Hardware,
    options: dict[str, Any],
) -> None:
    from quickspike.api import finish, fit, train
    from quickspike.data import ImageStream
    from quickspike.errors import OptionError
    from quickspike.files import check_writable
    from quickspike.method import create
    from quickspike.models import load_model, save_weights

    chosen = None if source.method is None else create(source.method, **options)
    # What a registered network holds without weights is random: no answers to learn.
    if settings.distill and teacher.teacher is None and (chosen is None or (source.weights is None and ".py:" not in model)):
        raise OptionError("--distill needs a trained network to learn from: with --method the --weights of MODEL, or else --teacher")
    out = files.out / ("weights.safetensors" if chosen is None else "network.safetensors")
    check_writable(out)
    data_set = data.load(model=model, weights=source.weights)
    network = load_model(model, source.weights, settings.seed)
    trainer = _trainer(data_set, settings, augmentation, hardware, files, teacher)
    if chosen is None:
        trained, history = train(network, trainer)
        if trainer.fabric.is_global_zero:
            save_weights(trained, out)
            _tell(files, out, history=list(history.rows))
        return
    images = ImageStream(data_set.loader("train", limit=min(source.calibration_images, data_set.size("train"))))
    snn = finish(fit(network, images, chosen, trainer), images, chosen)
    snn.provenance.update(model=Path(model).name, data=Path(data.data).name, preprocessing=dataclasses.asdict(data_set.preprocessing))
    if trainer.fabric.is_global_zero:
        snn.save(out)
        _tell(files, out, method=snn.method)


def _tell(files: TrainingFiles, out: Path, **more: Any) -> None:
    if files.json:
        print_json({"out": str(out), **more})
    else:
        show(f"{out}; figures of every epoch: {out.parent / 'metrics.csv'}")


def tune_command() -> Callable[..., None]:
    """The `tune` command with all settings of a training."""
    from quickspike.augmentation import Augmentation
    from quickspike.training import Training
    from quickspike.tuning import Tuning

    def tune(network: Any, data: Any, files: Any, tuning: Any, training: Any, teacher: Any, augmentation: Any, hardware: Any) -> None:
        """Fine-tune a spiking network end to end with surrogate gradients: weights, thresholds and leaks."""
        settings, drawn = Training(**dataclasses.asdict(training)), Augmentation(**dataclasses.asdict(augmentation))
        _tune(network, data, files, Tuning(**dataclasses.asdict(tuning)), settings, teacher, drawn, hardware)

    tune.__annotations__ = {
        "network": Annotated[Path, tyro.conf.Positional, Help(metavar="NETWORK", help="a spiking network that was saved before")],
        "data": DataArguments,
        "files": _flat(TrainingFiles, "files"),
        "tuning": _flat(options_type(Tuning), "tuning"),
        "training": _flat(options_type(Training, epochs=4, **TUNING), "training"),
        "teacher": _flat(Teacher, "teacher"),
        "augmentation": _flat(options_type(Augmentation), "augmentation"),
        "hardware": _flat(Hardware, "hardware"),
    }
    return tune


def _tune(
    network: Path,
    data: DataOptions,
    files: TrainingFiles,
    tuning: Tuning,
    settings: Training,
    teacher: Teacher,
    augmentation: Augmentation,
    hardware: Hardware,
) -> None:
    from quickspike.api import tune
    from quickspike.checkpoint import load
    from quickspike.files import check_writable

    out = files.out / "network.safetensors"
    check_writable(out)
    snn = load(network)
    data_set = data.load(snn.provenance.get("preprocessing", snn.provenance.get("statistics")))
    trainer = _trainer(data_set, settings, augmentation, hardware, files, teacher)
    tuned = tune(snn, trainer, tuning)
    if trainer.fabric.is_global_zero:
        tuned.save(out)
        _tell(files, out, method=tuned.method)


@dataclasses.dataclass(frozen=True)
class DataPlace:
    """Where the data of a recipe lie."""

    data: Annotated[str | None, Help(metavar="NAME", help="take the images from here instead, for example npz:FILE")] = None
    data_dir: Annotated[Path | None, Help(metavar="DIR", help="folder of torchvision's files")] = None
    download: Annotated[bool, Help(help="let torchvision fetch missing files")] = False


def run(
    recipe: Annotated[Path, tyro.conf.Positional, Help(metavar="RECIPE", help="a TOML file, see the folder recipes")],
    place: Annotated[DataPlace, tyro.conf.OmitArgPrefixes],
    hardware: Annotated[Hardware, tyro.conf.OmitArgPrefixes],
    out: Annotated[Path | None, Help(metavar="DIR", help="folder for everything it makes [default: runs/NAME]")] = None,
    seeds: Annotated[tuple[int, ...] | None, Help(metavar="N", help="run with these seeds instead of the recipe's")] = None,
    resume: Annotated[bool, Help(help="go on where an interrupted run in the same folder stopped")] = False,
    tensorboard: Annotated[bool, Help(help="also write figures for TensorBoard")] = False,
    dry_run: Annotated[bool, Help(help="check the recipe, build and trace its network, say what would be done, and stop")] = False,
    json: Json = False,
) -> None:
    """Run an experiment from a recipe and show what it gave beside the published figure."""
    from quickspike.recipe import Place, load_recipe_data, plan, read_recipe, run_recipe
    from quickspike.report import recipe_tables

    chosen = read_recipe(recipe)
    if seeds is not None:
        chosen = dataclasses.replace(chosen, seeds=seeds)
    if dry_run:
        lines = plan(chosen, load_recipe_data(chosen, place.data, place.data_dir, place.download))
        print_json(lines) if json else show("\n".join(lines))
        return
    if hardware.precision is not None:
        chosen = dataclasses.replace(chosen, precision=hardware.precision)
    fabric = hardware.launch(chosen.precision)
    result = run_recipe(
        chosen,
        Place(
            out=out or Path("runs") / recipe.stem,
            fabric=fabric,
            data=place.data,
            data_dir=place.data_dir,
            download=place.download,
            resume=resume,
            tensorboard=tensorboard,
            watcher=TrainingWatcher(quiet=not fabric.is_global_zero),
            command=f"quickspike run {shlex.join(without_paths(sys.argv[2:]))}",
        ),
    )
    if fabric.is_global_zero:
        print_json(result) if json else show(recipe_tables(result))


def compare(
    model: ModelName,
    data: DataArguments,
    methods: Annotated[tuple[str, ...] | None, Help(metavar="NAME", help="methods to compare [default: all]")] = None,
    steps: Annotated[tuple[int, ...], Help(metavar="T", help="numbers of steps; every method is fitted for each [unit: steps]")] = (
        1,
        2,
        4,
        8,
    ),
    weights: Weights = None,
    calibration_images: Annotated[
        int, Help(metavar="N", help="first N training images, without labels [unit: images; range: >= 1]")
    ] = 1000,
    images: Annotated[int | None, Help(metavar="N", help="first N test images [unit: images; range: >= 1; default: all]")] = None,
    out: Annotated[Path | None, Help(metavar="FILE", help="also write the figures as JSON")] = None,
    page: Annotated[Path | None, Help(metavar="FILE", help="also write a page: accuracy, errors and cost of all, HTML")] = None,
    device: Annotated[str, Help(metavar="NAME", help="auto, cpu, cuda, mps, ...")] = "auto",
    json: Json = False,
) -> None:
    """Convert one network with several methods, calibrated only, and show their accuracies in one table."""
    from quickspike.api import convert
    from quickspike.console import dump
    from quickspike.errors import OptionError
    from quickspike.evaluation import evaluate, make_fabric
    from quickspike.files import check_writable, write_text
    from quickspike.method import all_methods, get
    from quickspike.models import load_model
    from quickspike.page import write_page
    from quickspike.report import compare_table

    if not steps:
        raise OptionError("--steps needs at least one number")
    names = methods or tuple(all_methods())
    for name in names:
        get(name)
    for path in filter(None, (out, page)):
        check_writable(path)
    source = make_fabric(device).to_device(load_model(model, weights))
    data_set = data.load(model=model, weights=weights)
    reports, entries = {}, []
    for name in Tracked(names, "comparing methods"):
        found = {}
        for count in steps:
            loader = data_set.loader("train", limit=min(calibration_images, data_set.size("train")))
            snn = convert(source, loader, name, steps=count)
            found[count] = evaluate(snn, data_set.loader("test", limit=images), source, (count,), device=device)
        reports[name] = found
        if page is not None:
            entries.append(_entry(name, snn, found, data_set))
    plain = {name: {str(count): report.to_json() for count, report in found.items()} for name, found in reports.items()}
    if out is not None:
        write_text(out, dump(plain))
    if page is not None:
        command = f"quickspike {shlex.join(without_paths(sys.argv[1:]))}"
        write_page(page, f"{Path(model).name} on {data_set.name}: methods compared", entries, command)
    print_json(plain) if json else show(compare_table(reports))


def _entry(name: str, snn: SpikingNetwork, found: Mapping[int, Report], data: DataSet) -> Entry:
    """One method on the page: its accuracy for every T, all else for the last."""
    from quickspike.page import described

    last = found[max(found)]
    accuracy = {steps: report.accuracy[steps] for steps, report in sorted(found.items())}
    latency = {steps: report.latency[steps] for steps, report in sorted(found.items())}
    return described(name, dataclasses.replace(last, steps=tuple(accuracy), accuracy=accuracy, latency=latency), snn, data)


def search(
    model: ModelName,
    data: DataArguments,
    methods: Annotated[tuple[str, ...] | None, Help(metavar="NAME", help="methods to try, calibrated only [default: all]")] = None,
    max_drop: Annotated[float, Help(metavar="LOSS", help="accuracy that may be lost [unit: percentage points; range: >= 0]")] = 1.0,
    most_steps: Annotated[int, Help(metavar="T", help="largest number of steps to try [unit: steps; range: >= 1]")] = 64,
    synchronous: Annotated[bool, Help(help="try each method with layers that wait for whole windows, too")] = False,
    energy: Annotated[str | None, Help(metavar="DEVICE", help="weigh energy too, on this device: see `evaluate --energy`")] = None,
    max_energy: Annotated[float | None, Help(metavar="NJ", help="energy that an image may take there [unit: nJ; range: >= 0]")] = None,
    max_minutes: Annotated[float | None, Help(metavar="N", help="begin no new trial after so long [unit: minutes; range: > 0]")] = None,
    weights: Weights = None,
    calibration_images: Annotated[
        int, Help(metavar="N", help="first N training images, without labels [unit: images; range: >= 1]")
    ] = 1000,
    images: Annotated[
        int, Help(metavar="N", help="last N training images, on which accuracy is measured [unit: images; range: >= 1]")
    ] = 2000,
    out: Annotated[Path | None, Help(metavar="FILE", help="keep every trial there, as JSON; the same command goes on from it")] = None,
    network: Annotated[Path | None, Help(metavar="FILE", help="save the best network")] = None,
    tune_epochs: Annotated[
        int, Help(metavar="N", help="try each method fine-tuned for so long, too, distilled from the source [unit: epochs; range: >= 0]")
    ] = 0,
    precision: Annotated[str, Help(metavar="NAME", help="of fine-tuning, Lightning Fabric's name: 32-true, bf16-mixed, ...")] = "32-true",
    device: Annotated[str, Help(metavar="NAME", help="auto, cpu, cuda, mps, ...")] = "auto",
    json: Json = False,
) -> None:
    """Find the least T, and the method, that keep the accuracy within a bound; then measure that network on the test images."""
    from quickspike.augmentation import Augmentation
    from quickspike.evaluation import evaluate, make_fabric
    from quickspike.files import check_writable
    from quickspike.method import all_methods, get
    from quickspike.models import load_model
    from quickspike.options import options_of
    from quickspike.report import search_tables
    from quickspike.searching import Candidate, Trial
    from quickspike.searching import search as find
    from quickspike.training import Trainer, Training

    candidates = [Candidate(name) for name in methods or tuple(all_methods())]
    if synchronous:
        waiting = (one for one in candidates if "synchronous" in options_of(get(one.method)))
        candidates += [Candidate(one.method, {"synchronous": True}) for one in waiting]
    candidates += [dataclasses.replace(one, epochs=tune_epochs) for one in candidates if tune_epochs]
    for path in filter(None, (out, network)):
        check_writable(path)
    source = make_fabric(device).to_device(load_model(model, weights))
    data_set = data.load(model=model, weights=weights)
    size = data_set.size("train")
    trainer = Trainer(
        fabric=make_fabric(device, precision),
        data=data_set.without_last(min(images, size)) if tune_epochs else data_set,
        settings=Training(distill=0.9, temperature=4.0, **TUNING),
        augmentation=Augmentation(),
        folder=None if out is None else out.with_suffix(""),
        watcher=TrainingWatcher(),
    )
    calibration = data_set.loader("train", limit=min(calibration_images, size))
    held_out = data_set.loader("train", limit=min(images, size), last=True)

    def progress(trial: Trial) -> None:
        sys.stderr.write(f"{trial.candidate}, T = {trial.steps}: {trial.accuracy:.2f} %, {trial.drop:+.2f} lost, {trial.seconds:.0f} s\n")

    found = find(
        source,
        calibration,
        held_out,
        candidates,
        max_drop=max_drop,
        most_steps=most_steps,
        energy=energy,
        max_energy=None if max_energy is None else 1e3 * max_energy,
        max_seconds=None if max_minutes is None else 60 * max_minutes,
        device=device,
        trainer=trainer if tune_epochs else None,
        file=out,
        progress=progress,
    )
    report = None
    if found.best is not None and (best := found.network) is not None:
        best.provenance.update(model=Path(model).name, data=Path(data.data).name, preprocessing=dataclasses.asdict(data_set.preprocessing))
        report = evaluate(best, data_set.loader("test"), source, (found.best.steps,), device=device)
        if network is not None:
            best.save(network)
    if json:
        print_json(found.to_json() | {"test": None if report is None else report.to_json()})
    else:
        show(search_tables(found, report))
