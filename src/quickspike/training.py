"""One training loop, for source networks and spiking ones alike, on Lightning Fabric.

A method calls it through the `Train` protocol and says what is special about its stage: the loss, the parameters,
what happens after a step. Devices, precision, files, resuming and progress stay in here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from quickspike.augmentation import Augmentation
from quickspike.batches import Share, TrainingBatches
from quickspike.capture import copy_of
from quickspike.conversion import SpikingNetwork
from quickspike.data import BATCH, DataSet, Images, only_class
from quickspike.errors import CheckpointError, DataError, OptionError, QuickspikeError
from quickspike.features import distance, watched
from quickspike.files import write_bytes
from quickspike.memory import keep_freed_memory, out_of_memory
from quickspike.metrics import Metrics
from quickspike.models import read_plain
from quickspike.options import option, validate
from quickspike.provenance import digest
from quickspike.readouts import readout
from quickspike.structure import Outputs, each, first, tensors

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from quickspike.graph import Traced

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(network, images `[B, ...]`, targets `[B]` or `[B, K]`) to a scalar."""
Answers = Callable[[Tensor], Tensor]
"""Images `[B, ...]` to logits `[B, K]`, float32, without gradients."""
Row = dict[str, float]


ADVICE = "lower the learning rate, clip the gradient (--clip 1), or train in 32-true precision"


class TrainingError(QuickspikeError):
    """A training cannot go on: its loss is no number, or its checkpoint does not fit."""


class Interrupted(KeyboardInterrupt):
    """The user stopped a training; the message says which file continues it."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained: optimiser, schedule, regularisation, choice of the final weights."""

    name: ClassVar[str] = "training"
    later: ClassVar[tuple[str, ...]] = ("every_step", "distill_features")
    """Options that came after results were made without them: where they are off, nothing tells of them."""

    epochs: int = option(24, "passes over the training images", unit="epochs", low=0, high=1_000_000)
    batch_size: int = option(128, "images per optimiser step, over all devices together", unit="images", low=1, high=2**20)
    accumulate: int = option(1, "parts that a batch is cut into, one after the other, to save memory", unit="parts", low=1, high=2**20)
    optimiser: Literal["sgd", "adam", "adamw", "adadelta", "muon"] = option(
        "sgd",
        "sgd has Nesterov's momentum, adam keeps the largest second moment, muon gets further in few epochs (0.005, weight_decay=0.6)",
    )
    learning_rate: float = option(0.2, "largest learning rate", low=0, high=1000, low_open=True)
    momentum: float = option(0.9, "momentum of sgd and muon, first beta of adam and adamw", low=0, high=0.9999)
    weight_decay: float = option(5e-4, "on weights of layers; biases, batch norm, ceilings and thresholds have none", low=0, high=1)
    schedule: Literal["one_cycle", "cosine", "step", "exponential", "constant"] = option(
        "one_cycle", "learning rate: up and down to 0, down a cosine to 0, divided at milestones, multiplied each epoch, or fixed"
    )
    warmup: float = option(0.2, "share of the steps in which the learning rate rises (schedule=one_cycle)", low=0, high=1)
    milestones: str = option("0.6 0.8 0.9", "shares of the epochs after which it is multiplied (schedule=step)")
    factor: float = option(0.2, "what it is multiplied by (schedule=step, exponential)", low=0, high=1, low_open=True)
    loss: Literal["cross_entropy", "squared_error"] = option("cross_entropy", "loss on the logits; squared_error is against 0 and 1")
    label_smoothing: float = option(0.0, "share of the target that is spread over all classes", low=0, high=0.999)
    distill: float = option(
        0.0,
        "share of the loss that is the distance to a teacher's answers instead of to the labels; a method's own losses stay as they are",
        low=0,
        high=1,
    )
    temperature: float = option(
        2.0, "what logits are divided by before they are held against the teacher's", low=0, high=100, low_open=True
    )
    distill_features: float = option(
        0.0,
        "weight of the distance to what the layers of a teacher of the same architecture give, added to the loss (methods and tune)",
        low=0,
        high=1000,
    )
    every_step: bool = option(
        False,
        "the loss is the mean of the losses of the answers after 1, 2, .. T steps, so that one network is good at all of them "
        "(spiking networks only)",
    )
    clip: float = option(0.0, "largest norm of the gradient; 0 for none", low=0, high=1e9)
    ema: float = option(
        0.0,
        "decay of the moving average of the weights that is used in the end, at most (1 + n)/(10 + n) at step n; 0 for none",
        low=0,
        high=0.999999,
    )
    validation: int = option(
        0, "training images held out to measure on; the test images never choose anything", unit="images", low=0, high=2**31
    )
    keep: Literal["last", "best"] = option("last", "weights of the last epoch, or of the best by validation accuracy")
    patience: int = option(
        0, "epochs without a better validation accuracy after which training stops; 0 for never", unit="epochs", low=0, high=10**6
    )
    whiten: bool = option(
        False, "the first convolution starts as filters that whiten patches of training images, and stays so (source networks only)"
    )
    seed: int = option(0, "seed of shuffling, augmentation and dropout", low=0, high=2**31 - 1)

    def __post_init__(self) -> None:
        validate(self)
        shares(self.milestones)
        if (self.patience or self.keep == "best") and not self.validation:
            raise OptionError("training: patience and keep=best need validation images, got validation=0")

    @property
    def taught(self) -> str:
        """The options that need a teacher; empty if none does."""
        needing = {"distill": self.distill, "distill_features": self.distill_features}
        return " and ".join(f"{name}={value:g}" for name, value in needing.items() if value)


def start_anew(folder: Path) -> None:
    """Remove what an earlier training left in `folder` that a later `--resume` would go on from."""
    for path in [*folder.glob("*.ckpt"), *folder.glob("run.json")]:
        path.unlink()


def shares(text: str) -> tuple[float, ...]:
    """Numbers in (0, 1), ascending, from a text such as "0.6 0.8".

    Raises:
        OptionError: it is something else.
    """
    try:
        values = tuple(map(float, text.split()))
    except ValueError:
        values = (math.nan,)
    if not all(0 < value < 1 for value in values) or list(values) != sorted(values):
        raise OptionError(f"training: milestones must be ascending numbers between 0 and 1, got {text!r}")
    return values


def rate_factor(settings: Training, progress: float) -> float:
    """Share of the largest learning rate at `progress` in [0, 1] of a stage."""
    if settings.schedule == "one_cycle" and progress < settings.warmup:
        return (progress + 1e-3) / (settings.warmup + 1e-3)
    if settings.schedule == "one_cycle":
        return (1 - progress) / max(1 - settings.warmup, 1e-9)
    if settings.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if settings.schedule == "step":
        return settings.factor ** sum(progress >= share for share in shares(settings.milestones))
    if settings.schedule == "exponential":
        return settings.factor ** math.floor(progress * settings.epochs + 1e-9)
    return 1.0


@dataclass(frozen=True)
class History:
    """One row of figures per epoch of a stage."""

    stage: str
    rows: tuple[Row, ...] = ()


class Train(Protocol):
    """What a method's `train` and `tune` are given: run one stage of training on `module`, in place."""

    def __call__(
        self,
        module: nn.Module,
        stage: str,
        *,
        loss: Loss | None = None,
        groups: Sequence[dict[str, Any]] | None = None,
        after_step: Callable[[], None] | None = None,
        mode: Callable[[nn.Module], object] | None = None,
        **changes: Any,
    ) -> History:
        """Train.

        Args:
            module: its parameters are changed in place; it ends in evaluation mode.
            stage: names files and figures.
            loss: by default the one of the settings, on `module(images)`.
            groups: parameter groups as torch.optim takes them; nothing else is trained. `rate` multiplies the
                learning rate of a group. By default all parameters, those with one axis or none without weight decay.
            after_step: called after every optimiser step, to keep parameters within bounds.
            mode: puts the module into the mode it is trained in; by default `module.train()`.
            **changes: settings that this stage changes, for example `epochs=2`.
        """

    def accuracy(self, module: nn.Module) -> float | None:
        """Accuracy on the validation images in percent; None if none are held out."""

    def answers(self, module: nn.Module) -> Answers:
        """What `module` answers to images now, whatever becomes of it, in the precision of the training."""


class Watcher(Protocol):
    """Who shows progress."""

    def begin(self, stage: str, samples: int) -> None:
        """A stage of that many images, over all its epochs, begins."""

    def advance(self, samples: int) -> None:
        """So many more images are done."""

    def row(self, stage: str, row: Row) -> None:
        """The figures of an epoch."""

    def end(self) -> None:
        """The stage is over."""


class Silent:
    """Shows nothing."""

    def begin(self, stage: str, samples: int) -> None: ...

    def advance(self, samples: int) -> None: ...

    def row(self, stage: str, row: Row) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Settings and surroundings of a training; calling it runs one stage, see `Train`.

    Raises:
        TrainingError: the loss is no number, or a checkpoint belongs to another training.
        Interrupted: the user pressed Ctrl-C.
    """

    fabric: Fabric
    data: DataSet
    settings: Training
    augmentation: Augmentation = field(default_factory=Augmentation)
    folder: Path | None = None
    """Where checkpoints and metrics go; None keeps nothing."""
    resume: bool = False
    watcher: Watcher = field(default_factory=Silent)
    tensorboard: bool = False
    teacher: nn.Module | None = None
    """Whose answers the network learns (`Training.distill`); not modified."""
    guide: Traced | None = None
    """The teacher as a graph with the student's sites, answering in its place (`Training.distill_features`); made by `fit` and `tune`."""
    resumed: list[float] = field(default_factory=list)
    """Gets the seconds of the epochs that a checkpoint holds, an entry for each stage that went on from one."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else a checkpoint has to agree with: options of the method, and what of a spiking network is tuned."""

    def __call__(
        self,
        module: nn.Module,
        stage: str,
        *,
        loss: Loss | None = None,
        groups: Sequence[dict[str, Any]] | None = None,
        after_step: Callable[[], None] | None = None,
        mode: Callable[[nn.Module], object] | None = None,
        **changes: Any,
    ) -> History:
        settings = dataclasses.replace(self.settings, **changes)
        if self.fabric.device.type == "cpu":
            keep_freed_memory()
        batches = self._batches(settings)
        with _own_randomness(self.fabric.device):
            run = _Stage(self, settings, batches, module, stage, loss, groups, after_step, mode)
            return run.run()

    def accuracy(self, module: nn.Module) -> float | None:
        """See `Train.accuracy`."""
        if not self.settings.validation:
            return None
        with _own_randomness(self.fabric.device):
            return _accuracy(self.fabric, module, self._batches(self.settings))

    def answers(self, module: nn.Module) -> Answers:
        """See `Train.answers`.

        Raises (when it is called):
            DataError: the network cannot take the images, or answers with something else than finite logits.
        """
        return _Asked(self.fabric, module, "the reference")

    def calibration(self, images: int) -> DataLoader[Any]:
        """The first training images that are not held out, as many as there are up to `images`, not augmented.

        Raises:
            DataError: `images` is below 1.
        """
        if images < 1:
            raise DataError(f"calibration needs at least one image, got {images}")
        kept = self._batches(self.settings).indices[:images].tolist()
        return DataLoader(Subset(self.data.train, kept), batch_size=BATCH, num_workers=self.data.workers)

    def _batches(self, settings: Training) -> TrainingBatches:
        label = only_class(self.data.train.labels) if isinstance(self.data.train, Images) else None
        if label is not None:
            raise DataError(f"{self.data.name}: the training images are all of class {label}; there is nothing to learn from them")
        share = Share(self.fabric.global_rank, self.fabric.world_size)
        return TrainingBatches(
            self.data, settings.validation, settings.batch_size, self.augmentation, settings.seed, self.fabric.device, share
        )


def _accuracy(fabric: Fabric, network: nn.Module, batches: TrainingBatches) -> float:
    network.eval()
    right, count = 0, 0
    with torch.no_grad(), fabric.autocast():
        for images, labels in batches.validation():
            right += int((first(network(images)).argmax(1) == labels).sum())
            count += len(labels)
    return 100 * _shared_mean(fabric, right, count)


def _shared_mean(fabric: Fabric, total: float, count: float) -> float:
    """total/count over all processes."""
    own = torch.tensor([total, count], dtype=torch.float64, device="cpu" if fabric.device.type == "mps" else fabric.device)
    sums = fabric.all_reduce(own, reduce_op="sum")
    return float(sums[0] / sums[1])


class _EveryStep(nn.Module):
    """Answers after each step, `[T, B, K]`; a module of its own, since devices are set up for calls of a module only."""

    def __init__(self, snn: SpikingNetwork) -> None:
        super().__init__()
        self.snn = snn

    def forward(self, images: Tensor) -> Outputs:
        # Of bfloat16 outputs the sum over the steps would lose what the later ones add.
        return each(lambda outputs: readout(outputs.float()), self.snn.outputs(images))


def _every_step_of(module: nn.Module, stage: str) -> _EveryStep:
    """The network that gives its answers after each step.

    Raises:
        OptionError: it has none.
    """
    if not isinstance(module, SpikingNetwork):
        raise OptionError(f"stage {stage}: every_step is for fine-tuning a spiking network; a source network knows no steps")
    if module.synchronous and module.steps > 1:
        raise OptionError(f"stage {stage}: every_step needs neurons that stream; these wait for steps of T = {module.steps}")
    return _EveryStep(module)


def _loss_of(settings: Training, classes: int, teacher: _Asked | None, student: nn.Module) -> Loss:
    """The loss of the settings, for `student` on its own or within the network that the loss is called with.

    With `every_step` that of every answer after t steps counts alike (S. Deng et al., Temporal Efficient Training, ICLR
    2022, arXiv 2202.11946). Differs from the paper: there the output of each step alone is held against the label, here
    the mean of the outputs so far, which is what the network answers if it is stopped then.
    """

    def to_labels(logits: Tensor, targets: Tensor) -> Tensor:
        if settings.loss == "cross_entropy":
            return F.cross_entropy(logits, targets, label_smoothing=settings.label_smoothing)
        wanted = targets if targets.is_floating_point() else F.one_hot(targets, classes)
        return F.mse_loss(logits, wanted.float())

    def loss(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        with watched(student, () if teacher is None else teacher.sites) as given:
            logits = first(network(images)).float()
        steps = len(logits) if settings.every_step else 1
        if settings.every_step:
            logits = logits.flatten(0, 1)

        def again(wanted: Tensor) -> Tensor:
            return wanted.repeat(steps, *(1,) * (wanted.ndim - 1)) if steps > 1 else wanted

        to_targets = to_labels(logits, again(targets))
        if teacher is None:
            return to_targets
        wanted = teacher(images)
        mixed = to_targets
        if settings.distill:
            mixed = (1 - settings.distill) * to_targets + settings.distill * divergence(logits, again(wanted), settings.temperature)
        return mixed + settings.distill_features * distance(given, teacher.features) if teacher.sites else mixed

    return loss


def divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened answers from the teacher's, mean over the batch, in nats.

    Times the squared temperature, so that its gradient keeps its size (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        logits: `[B, K]`.
        wanted: the teacher's, `[B, K]`.
        temperature: both are divided by it first.

    Raises:
        DataError: the teacher has other classes.
    """
    if logits.shape != wanted.shape:
        raise DataError(f"the teacher answers {list(wanted.shape)}, the network {list(logits.shape)}; they must have the same classes")
    softened, answers = (F.log_softmax(values / temperature, 1) for values in (logits, wanted))
    return F.kl_div(softened, answers, log_target=True, reduction="batchmean") * temperature**2


class _Asked:
    """What a copy of a network answers, on the device and in the precision of the training; see `Answers`."""

    def __init__(self, fabric: Fabric, network: nn.Module, what: str, sites: Sequence[str] = ()) -> None:
        self.fabric, self.what, self.sites = fabric, what, sites
        self.features: dict[str, Tensor] = {}
        """What the modules at the sites gave at the last call."""
        self.network = fabric.to_device(copy_of(network))
        if any(parameter.ndim == 4 for parameter in self.network.parameters()):
            self.network.to(memory_format=torch.channels_last)

    def __call__(self, images: Tensor) -> Tensor:
        try:
            with torch.no_grad(), self.fabric.autocast(), watched(self.network, self.sites) as self.features:
                found = self.network(images)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{self.what} cannot take images {list(images.shape)}: {reason}") from error
        given = tensors(found)
        if not given or not bool(torch.isfinite(given[0]).all()):
            got = "NaN or infinity among them" if given else type(found).__name__
            raise DataError(f"{self.what} has to answer with finite logits [B, K], got {got}")
        return given[0].float()


def _teacher_of(trainer: Trainer, settings: Training, stage: str, module: nn.Module, student: nn.Module) -> _Asked | None:
    """The teacher that answers and, if features are learned, gives them; None if the settings need none.

    Raises:
        OptionError: there is no teacher, or none whose features this stage can learn.
    """
    if not settings.taught:
        return None
    if trainer.teacher is None:
        raise OptionError(f"{settings.taught} needs a teacher: the network that is to be learned from")
    if not settings.distill_features:
        return _Asked(trainer.fabric, trainer.teacher, "the teacher")
    if trainer.guide is None:
        raise OptionError(f"stage {stage}: distill_features is for training with a method and for fine-tuning, which know the layers")
    if isinstance(module, SpikingNetwork) and module.chunk:
        raise OptionError(f"stage {stage}: distill_features needs all steps at once; leave chunk={module.chunk} out")
    known = dict(student.named_modules())
    sites = [site.name for site in trainer.guide.sites]
    if missing := [name for name in sites if name not in known]:
        raise OptionError(
            f"stage {stage}: the network has no layer {missing[0]!r} as the teacher has; features are learned from a teacher of the same "
            "architecture"
        )
    return _Asked(trainer.fabric, trainer.guide.module, "the teacher", sites)


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside leaves the caller's generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _own_loss(trainer: Trainer, settings: Training, classes: int, stage: str, module: nn.Module) -> Loss:
    """The loss of the settings for a stage that has none of its own."""
    student = module.network if isinstance(module, SpikingNetwork) else module
    return _loss_of(settings, classes, _teacher_of(trainer, settings, stage, module, student), student)


class _Stage:
    """One stage while it runs."""

    def __init__(
        self,
        trainer: Trainer,
        settings: Training,
        batches: TrainingBatches,
        module: nn.Module,
        stage: str,
        loss: Loss | None,
        groups: Sequence[dict[str, Any]] | None,
        after_step: Callable[[], None] | None,
        mode: Callable[[nn.Module], object] | None,
    ) -> None:
        self.fabric, self.settings, self.batches, self.module, self.stage, self.loss = (
            trainer.fabric,
            settings,
            batches,
            module,
            stage,
            loss or _own_loss(trainer, settings, batches.classes, stage, module),
        )
        # What a loss of the caller's makes of images and targets is the caller's business.
        self.plain_loss = loss is None
        self.augmentation, self.about = trainer.augmentation, dict(trainer.about)
        if settings.taught and trainer.teacher is not None:
            self.about["teacher"] = digest(trainer.teacher.state_dict().values())
        self.watcher, self.resume, self.resumed = trainer.watcher, trainer.resume, trainer.resumed
        self.after_step, self.mode = after_step, mode or nn.Module.train
        self.file = None if trainer.folder is None else trainer.folder / f"{stage}.ckpt"
        self.metrics = Metrics(trainer.folder if self.fabric.is_global_zero else None, trainer.tensorboard)
        parameters = _choose(module, groups, settings.weight_decay)
        if any(parameter.ndim == 4 for parameter in module.parameters()):
            module.to(memory_format=torch.channels_last)
        optimiser = _optimiser(settings, parameters)
        self.network: Any = _every_step_of(module, stage) if settings.every_step and self.plain_loss else module
        self.optimiser: torch.optim.Optimizer = optimiser
        if settings.epochs:
            self.network, self.optimiser = self.fabric.setup(self.network, optimiser)
        self.average = _average(module, settings.ema)
        self.rows: list[Row] = []
        self.best: tuple[float, dict[str, Tensor]] | None = None

    def run(self) -> History:
        if self.resume:
            self._restore()
            self._all_restored()
        if not self._finished():
            self._check_fit()
        self.metrics.begin(self.stage, self.rows)
        if not self._finished():
            self._save()
        self.watcher.begin(self.stage, self.settings.epochs * len(self.batches) * self.batches.batch_size)
        self.watcher.advance(len(self.rows) * len(self.batches) * self.batches.batch_size)
        try:
            while not self._finished():
                self._epoch(len(self.rows))
                self._save()
        except KeyboardInterrupt:
            raise Interrupted(self._where_to_go_on()) from None
        finally:
            self.watcher.end()
        self._take_final_weights()
        self.module.eval()
        return History(self.stage, tuple(self.rows))

    def _check_fit(self) -> None:
        """Raise DataError if the network cannot take the images, or has too few classes for the labels."""
        if not self.plain_loss:
            return
        image = self.batches.example()
        self.module.eval()
        try:
            with torch.no_grad(), self.fabric.autocast():
                logits = self.module(image)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"stage {self.stage}: the network cannot take images {list(image.shape)}: {reason}") from error
        if logits.ndim != 2 or logits.shape[1] < self.batches.classes:
            raise DataError(
                f"stage {self.stage}: images of {self.batches.classes} classes do not fit a network that gives {list(logits.shape)}"
            )

    def _finished(self) -> bool:
        if len(self.rows) >= self.settings.epochs:
            return True
        accuracies = [row["validation_accuracy"] for row in self.rows if "validation_accuracy" in row]
        since = len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0
        return bool(self.settings.patience) and since >= self.settings.patience

    def _epoch(self, epoch: int) -> None:
        torch.manual_seed((self.settings.seed * 1_000_003 + epoch) * 64 + self.batches.share.rank)
        started = time.perf_counter()
        self.mode(self.module)
        total, count = 0.0, 0
        for index, (images, targets) in enumerate(self.batches.epoch(epoch)):
            value = self._step(epoch, index, images, targets)
            total, count = total + value * len(images), count + len(images)
            self.watcher.advance(len(images) * self.batches.share.processes)
        # A clock that stands still between two looks is no reason to stop.
        seconds = max(time.perf_counter() - started, 1e-9)
        self._agree()
        broken = [name for name, parameter in self.module.named_parameters() if not bool(torch.isfinite(parameter).all())]
        where = f"stage {self.stage}, epoch {epoch + 1}"
        self._stop_if(bool(broken), lambda: f"{where}: the parameter {broken[0]} is no finite number any more; {ADVICE}")
        row: Row = {
            "epoch": epoch + 1,
            "loss": _shared_mean(self.fabric, total, count),
            "learning_rate": self.optimiser.param_groups[0]["lr"],
        }
        if self.settings.validation:
            row["validation_accuracy"] = _accuracy(self.fabric, self._final(), self.batches)
            self._remember_best(row["validation_accuracy"])
        row |= {"seconds": seconds, "images_per_second": count * self.batches.share.processes / seconds}
        self.rows.append(row)
        self.metrics.extend(self.stage, [row])
        self.watcher.row(self.stage, row)

    def _agree(self) -> None:
        """Statistics of batch norm are those of each process's own images; from here on all have the mean of them."""
        if self.fabric.world_size == 1:
            return
        for network in (self.module, self._final()):
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(cast(Tensor, self.fabric.all_reduce(buffer.clone(), reduce_op="mean")))

    def _step(self, epoch: int, index: int, images: Tensor, targets: Tensor) -> float:
        progress = (epoch + index / len(self.batches)) / self.settings.epochs
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * group["rate"] * rate_factor(self.settings, progress)
        total = 0.0
        parts = list(zip(images.chunk(self.settings.accumulate), targets.chunk(self.settings.accumulate), strict=True))
        for number, (part, part_targets) in enumerate(parts, 1):
            with self.fabric.no_backward_sync(self.network, enabled=number < len(parts)):
                loss = self.loss(self.network, part, part_targets) * (len(part) / len(images))
                value = float(loss.detach())
                self._stop_if(not math.isfinite(value), partial(self._diagnosis, epoch, index, part))
                self.fabric.backward(loss)
            total += value
        if self.settings.clip:
            self.fabric.clip_gradients(self.network, self.optimiser, max_norm=self.settings.clip, error_if_nonfinite=False)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.after_step is not None:
            with torch.no_grad():
                self.after_step()
        if self.average is not None:
            self.average.update_parameters(self.module)
        return total

    def _final(self) -> nn.Module:
        """The network whose weights would be kept now."""
        return self.module if self.average is None else cast(nn.Module, self.average.module)

    def _remember_best(self, accuracy: float) -> None:
        if self.settings.keep == "best" and (self.best is None or accuracy > self.best[0]):
            self.best = accuracy, {name: tensor.detach().clone() for name, tensor in self._final().state_dict().items()}

    def _take_final_weights(self) -> None:
        if self.best is not None:
            self.module.load_state_dict(self.best[1])
        elif self.average is not None and self.rows:
            self.module.load_state_dict(self.average.module.state_dict())

    # What a checkpoint holds

    def _save(self) -> None:
        if self.file is None:
            return
        state = {
            "settings": self._described(),
            "rows": self.rows,
            "module": self.module.state_dict(),
            "optimiser": self.optimiser.state_dict() if self.settings.epochs else {},
            "average": None if self.average is None else self.average.state_dict(),
            "best": self.best,
        }
        if self.fabric.is_global_zero:
            written = io.BytesIO()
            torch.save(state, written)
            write_bytes(self.file, written.getbuffer())
        self.fabric.barrier()

    def _described(self) -> dict[str, Any]:
        return dataclasses.asdict(self.settings) | dataclasses.asdict(self.augmentation) | self.about

    def _restore(self) -> None:
        if self.file is None or not self.file.is_file():
            return
        try:
            state = read_plain(self.file, self.fabric.device)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.file}: {error.strerror or error}") from error
        except Exception as error:
            if out_of_memory(error):
                raise
            raise CheckpointError(f"{self.file}: not a whole training checkpoint; remove it to start this stage anew") from error
        if not isinstance(state, dict) or set(state) != {"settings", "rows", "module", "optimiser", "average", "best"}:
            raise CheckpointError(f"{self.file}: not a training checkpoint; remove it to start this stage anew")
        if not isinstance(state["settings"], dict) or not isinstance(state["rows"], list):
            raise CheckpointError(f"{self.file}: not a training checkpoint; remove it to start this stage anew")
        asked, made = self._described(), state["settings"]
        # An option that the checkpoint does not know is newer than it, and is off where it has no value.
        other = [
            f"{key}={made.get(key)!r} (now {value!r})" for key, value in asked.items() if (made[key] != value if key in made else value)
        ]
        if other:
            raise CheckpointError(f"{self.file} was made with {', '.join(other)}; resume with the same settings, or remove it")
        try:
            self.module.load_state_dict(state["module"])
            if self.settings.epochs:
                self.optimiser.load_state_dict(state["optimiser"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.rows, self.best = state["rows"], state["best"]
            self.resumed.append(sum(row["seconds"] for row in self.rows))
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{self.file} belongs to another network ({reason}); remove it to start this stage anew") from error

    def _all_restored(self) -> None:
        """Raise CheckpointError in every process if some went on from a checkpoint that others do not see."""
        if self.fabric.world_size == 1:
            return
        own = torch.tensor(float(len(self.rows)), device=self.fabric.device)
        most, least = (float(sign * cast(Tensor, self.fabric.all_reduce(sign * own, reduce_op="max"))) for sign in (1, -1))
        if most != least:
            raise CheckpointError(
                f"{self.file} holds {int(most)} epochs for some processes and {int(least)} for others; "
                "give a folder that all machines share, or start anew without --resume"
            )

    def _where_to_go_on(self) -> str:
        if self.file is None:
            return f"stage {self.stage} was interrupted in epoch {len(self.rows) + 1}; no folder was given, so nothing is kept"
        return (
            f"stage {self.stage} was interrupted in epoch {len(self.rows) + 1}; {self.file} holds the epochs before it: go on with --resume"
        )

    def _stop_if(self, broken: bool, diagnosis: Callable[[], str]) -> None:
        """Raise TrainingError in every process if something broke in one of them, for which the others would wait for good."""
        processes, rank = self.fabric.world_size, self.fabric.global_rank
        if processes > 1:
            mark = torch.tensor(float(processes - rank) if broken else 0.0, device=self.fabric.device)
            first_broken = processes - int(cast(Tensor, self.fabric.all_reduce(mark, reduce_op="max")))
        else:
            first_broken = 0 if broken else 1
        if first_broken < processes:
            # One of them says why, so that all of them say the same.
            raise TrainingError(self.fabric.broadcast(diagnosis() if rank == first_broken else "", src=first_broken))

    def _diagnosis(self, epoch: int, index: int, images: Tensor) -> str:
        with torch.no_grad(), self.fabric.autocast():
            where = first_not_finite(self.module, images)
        return f"stage {self.stage}, epoch {epoch + 1}, step {index + 1}: the loss is no finite number; first seen at {where}; {ADVICE}"


def first_not_finite(module: nn.Module, images: Tensor) -> str:
    """The first parameter or layer output that is NaN or infinite, by name."""
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"the parameter {name}"
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            if isinstance(out, Tensor) and not bool(torch.isfinite(out).all()):
                found.append(name)

        return hook

    hooks = [layer.register_forward_hook(look(name)) for name, layer in module.named_modules() if name and not list(layer.children())]
    try:
        module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return f"the layer {found[0]}" if found else "the loss itself; all layers are finite"


def _choose(module: nn.Module, groups: Sequence[dict[str, Any]] | None, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups; everything outside them stops learning."""
    if groups is None:
        groups = parameter_groups(module, [])
    chosen = [{"weight_decay": weight_decay, "rate": 1.0, **group} for group in groups if group["params"]]
    if not chosen:
        raise OptionError("there is no parameter to train: nothing to learn is left in the groups")
    learning = {id(parameter) for group in chosen for parameter in group["params"]}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in learning)
    return chosen


def parameter_groups(module: nn.Module, special: Sequence[nn.Parameter], **group: Any) -> list[dict[str, Any]]:
    """The default groups of all parameters, with `special` ones in a group of their own that has the entries `group`."""
    own = {id(parameter) for parameter in special}
    others = [parameter for parameter in module.parameters() if parameter.is_floating_point() and id(parameter) not in own]
    return [
        {"params": [parameter for parameter in others if parameter.ndim > 1]},
        {"params": [parameter for parameter in others if parameter.ndim <= 1], "weight_decay": 0.0},
        {"params": list(special), **group},
    ]


def _optimiser(settings: Training, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if settings.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=settings.momentum > 0)
    betas = (settings.momentum, 0.999)
    if settings.optimiser == "adam":
        return torch.optim.Adam(groups, lr=settings.learning_rate, betas=betas, amsgrad=True)
    if settings.optimiser == "adadelta":
        return torch.optim.Adadelta(groups, lr=settings.learning_rate)
    if settings.optimiser == "muon":
        optimiser: torch.optim.Optimizer = _muon()(
            groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=True, betas=betas
        )
        return optimiser
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas)


def _muon() -> Any:
    """The Muon of timm: PyTorch's own takes matrices only, no weights of convolutions."""
    try:
        from timm.optim.muon import Muon
    except ImportError as error:
        raise OptionError("optimiser=muon needs timm 1.0.21 or later: pip install 'quickspike[timm]'") from error
    return Muon


def _average(module: nn.Module, decay: float) -> Any:
    if not decay:
        return None
    from torch.optim.swa_utils import AveragedModel

    def follow(averages: Any, currents: Any, count: Tensor) -> None:
        # With the full decay from the beginning, a short training would end with a good part of its first weights.
        share = max(1 - decay, 9 / (10 + float(count)))
        for average, current in zip(averages, currents, strict=True):
            if average.is_floating_point():
                average.lerp_(current, share)
            else:
                average.copy_(current)

    update: Any = torch.no_grad()(follow)
    return AveragedModel(module, multi_avg_fn=update, use_buffers=True)
