"""The commands that train: train, tune and run. Like the others, plain typed functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from quickspike.cli_options import (
    DataArguments,
    DataOptions,
    Json,
    ModelName,
    Refine,
    Weights,
    auto_of,
    commands_of,
    method_options,
    options_type,
    remember_command,
    tell_attempt,
    typed,
)
from quickspike.console import TrainingWatcher, print_json, show
from quickspike.tuning import TUNING

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

    from quickspike.augmentation import Augmentation
    from quickspike.data import DataSet
    from quickspike.training import Trainer, Training
    from quickspike.tuning import Tuning

Help = tyro.conf.arg


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
        from quickspike.processes import start

        return start(self.device, self.precision or recipe_precision, self.devices, self.nodes, self.strategy)


@dataclasses.dataclass(frozen=True)
class TrainingFiles:
    """What comes out, and going on with it."""

    out: Annotated[Path, Help(metavar="DIR", help="folder for the network, checkpoints and figures of the training")] = Path("runs/train")
    resume: Annotated[bool, Help(help="go on where an interrupted training in the same folder stopped")] = False
    tensorboard: Annotated[bool, Help(help="also write figures for TensorBoard")] = False
    json: Json = False


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Whom the network learns from, with --distill (answers) or --distill-features (layers)."""

    teacher: Annotated[
        str | None,
        Help(
            metavar="MODEL",
            help="network that is learned from (--distill, --distill-features), named like MODEL [default: train: the source network]",
        ),
    ] = None
    teacher_weights: Annotated[Path | None, Help(metavar="FILE", help="its weights, as for --weights")] = None

    def load(self, taught: str) -> nn.Module | None:
        """The network; None if none is named."""
        from quickspike.errors import OptionError
        from quickspike.models import load_model

        if self.teacher is not None and not taught:
            raise OptionError(
                "--teacher does nothing without --distill, the share of the loss that its answers have, or --distill-features"
            )
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
        teacher=teacher.load(settings.taught),
    )


def _flat(kind: Any, name: str) -> Any:
    return Annotated[kind, tyro.conf.OmitArgPrefixes, Help(name=name)]


@dataclasses.dataclass(frozen=True)
class Source:
    """What the training starts from."""

    method: Annotated[
        str | None,
        Help(metavar="NAME", help="train with this method's activations and convert; auto: what measures best; without it: plain training"),
    ] = None
    refine: Refine = ()
    weights: Weights = None
    calibration_images: Annotated[
        int, Help(metavar="N", help="first N training images, without labels, that a method is calibrated on [unit: images; range: >= 1]")
    ] = 1000


def train_command(method: str | None) -> Callable[..., None]:
    """The `train` command with all settings of a training, and the options of the method if one is named."""
    from quickspike.augmentation import Augmentation
    from quickspike.training import Training

    def train(
        model: Any, data: Any, source: Any, files: Any, training: Any, teacher: Any, augmentation: Any, hardware: Any, options: Any
    ) -> None:
        """Train a source network, plainly or with a method's activations; with a method, convert it too."""
        settings, drawn = Training(**dataclasses.asdict(training)), Augmentation(**dataclasses.asdict(augmentation))
        _train(model, data, source, files, settings, teacher, drawn, hardware, {} if options is None else dataclasses.asdict(options))

    kinds = (Training, Augmentation, Source, TrainingFiles, Teacher, Hardware, DataOptions)
    taken = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    train.__annotations__ = {
        "model": ModelName,
        "data": DataArguments,
        "source": _flat(Source, "source"),
        "files": _flat(TrainingFiles, "files"),
        "training": _flat(options_type(Training), "training"),
        "teacher": _flat(Teacher, "teacher"),
        "augmentation": _flat(options_type(Augmentation), "augmentation"),
        "hardware": _flat(Hardware, "hardware"),
        "options": _flat(method_options(method, taken) if method else type(None), "method"),
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
    from quickspike.choosing import choose
    from quickspike.data import ImageStream
    from quickspike.errors import OptionError
    from quickspike.files import check_writable
    from quickspike.method import create
    from quickspike.models import load_model, save_weights
    from quickspike.refinement import refinements_of
    from quickspike.report import choice_tables

    if source.method is None and source.refine:
        raise OptionError("--refine needs a --method to follow")
    auto = auto_of(source.method, options, source.refine)
    chosen = None if source.method is None or auto else create(source.method, **options, refinements=refinements_of(source.refine))
    # What a registered network holds without weights is random: no answers to learn.
    if settings.taught and teacher.teacher is None and (source.method is None or (source.weights is None and ".py:" not in model)):
        needing = "--distill" if settings.distill else "--distill-features"
        raise OptionError(f"{needing} needs a trained network to learn from: with --method the --weights of MODEL, or else --teacher")
    out = files.out / ("weights.safetensors" if source.method is None else "network.safetensors")
    check_writable(out)
    data_set = data.load(model=model, weights=source.weights)
    network = load_model(model, source.weights, settings.seed)
    trainer = _trainer(data_set, settings, augmentation, hardware, files, teacher)
    if source.method is None:
        trained, history = train(network, trainer)
        if trainer.fabric.is_global_zero:
            save_weights(trained, out)
            _tell(files, out, history=list(history.rows))
        return
    if chosen is None:
        watching = tell_attempt if trainer.fabric.is_global_zero else None
        choice = choose(network, trainer.calibration(source.calibration_images), auto, trainer=trainer, progress=watching)
        snn = choice.network
        if trainer.fabric.is_global_zero and not files.json:
            show(choice_tables(choice.to_json()))
    else:
        images = ImageStream(data_set.loader("train", limit=min(source.calibration_images, data_set.size("train"))))
        snn = finish(fit(network, images, chosen, trainer), images, chosen)
    snn.provenance.update(model=Path(model).name, data=Path(data.data).name, preprocessing=dataclasses.asdict(data_set.preprocessing))
    if trainer.fabric.is_global_zero:
        remember_command(snn)
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

    def tune(
        network: Any, data: Any, files: Any, start: Any, tuning: Any, training: Any, teacher: Any, augmentation: Any, hardware: Any
    ) -> None:
        """Fine-tune a spiking network end to end with surrogate gradients: weights, thresholds and leaks."""
        settings, drawn = Training(**dataclasses.asdict(training)), Augmentation(**dataclasses.asdict(augmentation))
        _tune(network, data, files, start, Tuning(**dataclasses.asdict(tuning)), settings, teacher, drawn, hardware)

    tune.__annotations__ = {
        "network": Annotated[Path, tyro.conf.Positional, Help(metavar="NETWORK", help="a spiking network that was saved before")],
        "data": DataArguments,
        "files": _flat(TrainingFiles, "files"),
        "start": _flat(Start, "start"),
        "tuning": _flat(options_type(Tuning), "tuning"),
        "training": _flat(options_type(Training, epochs=4, **TUNING), "training"),
        "teacher": _flat(Teacher, "teacher"),
        "augmentation": _flat(options_type(Augmentation), "augmentation"),
        "hardware": _flat(Hardware, "hardware"),
    }
    return tune


@dataclasses.dataclass(frozen=True)
class Start:
    """What of the network is changed before the fine-tuning."""

    reset: Annotated[
        Literal["subtract", "zero"] | None,
        Help(
            metavar="HOW",
            help="zero: spikes set the potential to 0, as most readers of NIR have it, instead of taking theta from it; subtract: the "
            "other way round [default: as the network has it]",
        ),
    ] = None


def _tune(
    network: Path,
    data: DataOptions,
    files: TrainingFiles,
    start: Start,
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
    if start.reset is not None:
        snn = snn.with_reset(start.reset)
    before = commands_of(snn, network.name)
    data_set = data.load(snn.provenance.get("preprocessing", snn.provenance.get("statistics")))
    trainer = _trainer(data_set, settings, augmentation, hardware, files, teacher)
    tuned = tune(snn, trainer, tuning)
    if trainer.fabric.is_global_zero:
        remember_command(tuned, before)
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
            command=typed(),
        ),
    )
    if fabric.is_global_zero:
        print_json(result) if json else show(recipe_tables(result))
