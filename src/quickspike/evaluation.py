"""Accuracy after each step, agreement with the source network, and firing rates, from one pass over labelled images."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from quickspike.anatomy import Anatomy, SiteAnatomy, anatomy_of, check_anatomy
from quickspike.capture import check_batch, copy_of
from quickspike.conversion import SpikingNetwork
from quickspike.data import Batches, share_of
from quickspike.errors import DataError, OptionError
from quickspike.memory import in_bytes, keep_freed_memory, out_of_memory
from quickspike.plausibility import warn_of_pixels
from quickspike.processor import warn_of_slow
from quickspike.provenance import machine, versions
from quickspike.simulation import simulate
from quickspike.structure import Outputs, each, first, places, tensors

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from quickspike.engines import Engine
    from quickspike.engines import Precision as EnginePrecision

logger = logging.getLogger(__name__)

SMALLEST = 1e-30
"""Squares are at least so large when something is divided by them."""
CHUNK = 400_000
"""Input values times steps that are simulated at once: small enough for the processor's caches, large enough to fill it."""


@dataclass(frozen=True)
class Report:
    """What an evaluation measured. Accuracies, agreements and deviations in percent, keyed by the number of steps."""

    samples: int
    steps: tuple[int, ...]
    accuracy: dict[int, float]
    """Top-1 accuracy of the readout after that many steps, of pixels where there is a label for each; empty without labels."""
    reference_accuracy: float | None
    """Top-1 accuracy of the source network on the same images; None without a reference or without labels."""
    agreement: dict[int, float]
    """Share of labels on which spiking and source network choose the same class; empty without a reference or labels."""
    rates: dict[str, float]
    """Mean spikes per neuron, or group of M, and step at each site over the whole run, in [0, 1], or [0, M]."""
    latency: dict[int, int]
    """Steps until the answer is there: T itself, or more where layers wait for steps of those before (depth x T for whole windows)."""
    method: dict[str, Any]
    provenance: dict[str, Any]
    seconds: float
    """Wall-clock time of the evaluation."""
    settings: dict[str, Any] = field(default_factory=dict)
    deviation: dict[int, float] = field(default_factory=dict)
    """Root mean square distance of what the network gives from what the source network gives, in percent of the latter's
    root mean square; of several outputs the one that is farthest off. Empty without a reference."""
    anatomy: Anatomy | None = None
    """The conversion error of every site and what it consists of; None unless it was asked for."""
    members: int = 1
    """Neurons in the group that stands in place of one of the source network's; 1 for plain neurons."""

    @property
    def layers(self) -> dict[str, SiteAnatomy]:
        """`anatomy` by site; empty unless it was asked for."""
        return {} if self.anatomy is None else {one.site: one for one in self.anatomy.sites}

    @property
    def engine(self) -> str:
        """Which engine ran and why, in a line."""
        ran = self.settings.get("engine")
        if not ran:
            return "engine: none asked for; the network as it is"
        kept = f"; in floating point: {', '.join(ran['in floating point'])}" if ran["in floating point"] else ""
        return f"engine: {ran['name']}, {ran['precision']} ({ran['why']}){kept}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; keys that are numbers of steps become strings."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("accuracy", "agreement", "latency", "deviation"):
            data[name] = {str(step): value for step, value in data[name].items()}
        if self.members == 1:
            del data["members"]
        if self.anatomy is None:
            del data["anatomy"]
        else:
            data["anatomy"] = self.anatomy.to_json()
        return data


def make_fabric(device: str = "auto", precision: str = "32-true", devices: int = 1, nodes: int = 1, strategy: str = "auto") -> Fabric:
    """The processes and devices of a run, through Lightning Fabric.

    Args:
        device: auto, cpu, cuda, mps, ... (Fabric's accelerator names).
        precision: 32-true, bf16-mixed, ... (Fabric's precision names).
        devices: processes on this machine, one device each; more than one are started by `launch()`.
        nodes: machines.
        strategy: auto, ddp, fsdp, ... (Fabric's strategy names).

    Raises:
        OptionError: Fabric does not know the device, the precision or the strategy, or the devices are not there.
    """
    from lightning_fabric import Fabric

    try:
        fabric = Fabric(accelerator=device, devices=devices, num_nodes=nodes, strategy=strategy, precision=precision)  # type: ignore[arg-type]
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OptionError(f"device {device!r} x {devices} with precision {precision!r} is not to be had: {reason}") from error
    warn_of_slow(precision, fabric.device.type)
    return fabric


def evaluate(
    snn: SpikingNetwork,
    data: Batches,
    reference: nn.Module | None = None,
    steps: Sequence[int] | None = None,
    *,
    device: str = "auto",
    precision: str = "32-true",
    fabric: Fabric | None = None,
    engine: Engine | None = None,
    bits: int = 8,
    engine_precision: EnginePrecision = "fp32",
    memory: str | int | None = None,
    anatomy: int = 0,
) -> Report:
    """Measure `snn` on labelled images.

    All step counts come from one simulation of the largest, except where layers wait for whole windows: such a network
    is simulated for each.

    Args:
        snn: the spiking network; not modified.
        data: batches of (images `[B, ...]`, labels `[B]`), or labels `[B, H, W]` for a network that gives logits
            `[B, K, H, W]`. Images alone, with a reference, for networks that choose no class: the report then tells how
            far what they give is from what the source network gives.
        reference: the source network, for its accuracy, and how far the spiking network is from it; not modified.
        steps: numbers of steps to report, by default 1, 2, 4, ... up to the network's own T. More than T is allowed:
            the network then runs longer than its thresholds were fitted for.
        device: see `make_fabric`.
        precision: see `make_fabric`.
        fabric: launched processes that share the batches between them, each sample in exactly one; instead of `device`.
            With another precision than 32-true it has to be made for that. Every process gets the report of all.
        engine: measure a copy made for this engine, see `quickspike.engines.accelerate`; None runs `snn` as it is.
        bits: of a weight (engine=integer, count).
        engine_precision: of the layers that read spikes (engine=fused): fp32 or bf16.
        memory: what a simulation may take, in bytes or as "2GiB"; None for what `snn.memory` says.
        anatomy: images, the first of `data`, on which the error of every layer is split into its sources (`Report.layers`), at the
            largest number of steps; 0 for none. It looks into `snn`, also where an engine is measured. Of several processes
            each does so with images of its own share.

    Raises:
        DataError: neither labels nor a reference, labels out of range, no images, or images that do not fit.
        OptionError: a number of steps below 1, an engine that cannot run this network, bf16 without an engine, or memory that is no
            amount or too little.
    """
    chosen = _steps(steps, snn.steps)
    if engine is None and engine_precision != "fp32":
        raise OptionError(f"engine_precision={engine_precision!r} needs an engine that has it; give engine='fused' too")
    if not isinstance(anatomy, int) or anatomy < 0:
        raise OptionError(f"anatomy must be a whole number of images >= 0, got {anatomy!r}")
    if anatomy:
        check_anatomy(snn)
    # Processes that are given may train in mixed precision; figures are those of the weights as they are.
    single = fabric is not None and precision == "32-true"
    fabric = fabric or make_fabric(device, precision)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    runs = [(step,) for step in chosen] if snn.synchronous else [chosen]
    networks = [(snn.with_steps(steps[-1]), steps) for steps in runs]
    for network, _ in networks:
        fabric.to_device(network)
    if engine is not None:
        from quickspike.engines import accelerate

        networks = [(accelerate(network, engine, engine_precision, bits), steps) for network, steps in networks]
    if memory is not None:
        for network, _ in networks:
            network.memory = in_bytes(memory)
    source = None if reference is None else fabric.to_device(copy_of(reference))
    tally, some, missing = _Tally(networks, source), list[Tensor](), anatomy
    started = time.perf_counter()
    with torch.inference_mode(), contextlib.nullcontext() if single else fabric.autocast(), together(fabric):
        for number, images, labels in share_of(data, fabric.global_rank, fabric.world_size):
            check_labels(images, labels, number, needed=source is None)
            if number == 1:
                warn_of_pixels(images, "the evaluation images")
            if missing:
                some.append(images[:missing])
                missing -= len(some[-1])
            tally.add(fabric.to_device(images), None if labels is None else fabric.to_device(labels), number)
    tally.share(fabric)
    if tally.samples == 0:
        raise DataError("the evaluation data is empty; give at least one batch of (images, labels)")
    settings = {
        "device": str(fabric.device),
        "processes": fabric.world_size,
        "precision": precision,
        "engine": networks[-1][0].provenance.get("engine"),
        "memory": memory if memory is not None else snn.memory,
        "versions": versions(),
        "machine": machine(),
    }
    if fabric.world_size == 1 and tally.samples > 1 and len(tally.classes) == 1:
        found = (tally.samples, *tally.classes)
        logger.warning("all %d evaluation images are of class %d; accuracy on one class says little, so mix the classes", *found)
    report = tally.report(snn, time.perf_counter() - started, settings)
    if not some:
        return report
    whole = snn.with_steps(chosen[-1])
    fabric.to_device(whole)
    return replace(report, anatomy=anatomy_of(whole, some))


@contextlib.contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """What one process cannot do, none goes on from: the others would wait for its share for ever.

    Raises:
        DataError: another process could not; that one raises what it found.
    """
    try:
        yield
    except Exception:
        # An interrupt ends its process at once.
        summed(fabric, [1])
        raise
    if summed(fabric, [0]) != [0]:
        raise DataError("another process could not do its part, and says why")


def summed(fabric: Fabric, numbers: Sequence[int]) -> list[int]:
    """Each number added up over all processes."""
    total = fabric.all_reduce(torch.tensor(numbers, dtype=torch.int64, device=fabric.device), reduce_op="sum")
    return cast(Tensor, total).tolist()


def accuracy_of(network: nn.Module, data: Batches, fabric: Fabric) -> float:
    """Top-1 accuracy in percent of an ordinary network `[B, ...]` to `[B, K]` over all processes; not modified.

    Raises:
        DataError: no labels, or no images.
    """
    network = fabric.to_device(copy_of(network))
    right, count = 0, 0
    with torch.inference_mode(), together(fabric):
        for number, images, labels in share_of(data, fabric.global_rank, fabric.world_size):
            check_labels(images, labels, number)
            answers = first(_fitting(partial(network, fabric.to_device(images)), "the network", images, number)).argmax(1)
            right += int((answers == fabric.to_device(labels)).sum())
            count += answers.numel()
    right, count = summed(fabric, [right, count])
    if count == 0:
        raise DataError("the evaluation data is empty; give at least one batch of (images, labels)")
    return 100 * right / count


def _steps(steps: Sequence[int] | None, own: int) -> tuple[int, ...]:
    if steps is None:
        steps = [2**power for power in range(own.bit_length()) if 2**power < own] + [own]
    if not steps or any(not isinstance(step, int) or isinstance(step, bool) or step < 1 for step in steps):
        raise OptionError(f"steps must be whole numbers >= 1, got {list(steps)!r}")
    return tuple(sorted(set(steps)))


def check_labels(images: Tensor, labels: Tensor | None, number: int, needed: bool = True) -> None:
    """Raise DataError unless batch `number` is sound and has a whole number for every image, or several."""
    check_batch(images, f"evaluation batch {number}")
    if labels is None:
        if needed:
            raise DataError(f"evaluation batch {number} has no labels; give (images, labels) pairs")
        return
    if labels.shape[:1] != images.shape[:1] or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        expected = f"{len(images)} whole numbers"
        raise DataError(f"evaluation batch {number}: labels must be {expected}, got {labels.dtype} {list(labels.shape)}")


def _fitting(forward: Callable[[], Any], what: str, images: Tensor, number: int) -> Any:
    try:
        return forward()
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"evaluation batch {number}: {what} cannot take images {list(images.shape)}: {reason}") from error


class _Tally:
    """Counts over the batches seen so far."""

    def __init__(self, networks: list[tuple[SpikingNetwork, tuple[int, ...]]], source: nn.Module | None) -> None:
        self.networks, self.source = networks, source
        self.network, steps = networks[-1][0], tuple(step for _, own in networks for step in own)
        self.steps = steps
        self.samples, self.labels = 0, 0
        self.classes: set[int] = set()
        """That labels of this process named, until there are two."""
        self.right = torch.zeros(len(steps), dtype=torch.int64)
        self.agree = torch.zeros(len(steps), dtype=torch.int64)
        self.reference_right = 0
        self.away = torch.zeros(len(steps) + 1, 1, dtype=torch.float64)
        """Squared distances from what the reference gives, by step and output; last the squares of what it gives."""
        self.spikes: dict[str, int] = {}
        self.neurons: dict[str, int] = {}
        for network, _ in networks:
            if len(network.input_shape) == 3:
                network.to(memory_format=torch.channels_last)

    def add(self, images: Tensor, labels: Tensor | None, number: int) -> None:
        """Count one batch, simulated in chunks that bound the memory."""
        for part, part_labels in self._chunks(images, labels):
            runs = [_fitting(partial(simulate, network, part), "the spiking network", part, number) for network, _ in self.networks]
            self.samples += len(part)
            for site, counts in runs[-1].spikes.items():
                self.spikes[site] = self.spikes.get(site, 0) + int(counts.sum())
            readouts = each(self._at_steps, *(run.readouts for run in runs))
            chosen = None if part_labels is None else self._classes(first(readouts), part_labels, number)
            if self.source is not None:
                self._compare(readouts, _fitting(partial(self.source, part), "the reference", part, number), chosen, part_labels)

    def _at_steps(self, *readouts: Tensor) -> Tensor:
        """`[T, B, ...]` of every network to `[S, B, ...]`, S being the numbers of steps asked for."""
        return torch.cat([own[[step - 1 for step in steps]] for own, (_, steps) in zip(readouts, self.networks, strict=True)])

    def _classes(self, logits: Tensor, labels: Tensor, number: int) -> Tensor:
        """Count the classes `[S, B, ...]` that are chosen after each number of steps."""
        if logits.ndim < 3 or logits[0].select(1, 0).shape != labels.shape:
            places = f"{len(labels)} whole numbers, or [B, H, W] for logits [B, K, H, W]"
            found = f"{labels.dtype} {list(labels.shape)} for logits {list(logits.shape[1:])}"
            raise DataError(f"evaluation batch {number}: labels must be {places}, got {found}")
        classes = logits.shape[2]
        if bool((labels < 0).any()) or bool((labels >= classes).any()):
            found = f"{int(labels.min())}..{int(labels.max())}"
            raise DataError(f"evaluation batch {number}: labels {found} do not fit a network with {classes} classes (0..{classes - 1})")
        if len(self.classes) < 2:
            self.classes |= {int(labels.min()), int(labels.max())}
        chosen = logits.argmax(2)
        self.right += (chosen == labels).flatten(1).sum(1).cpu()
        self.labels += labels.numel()
        return chosen

    def _compare(self, readouts: Outputs, wanted: Outputs, chosen: Tensor | None, labels: Tensor | None) -> None:
        """Count how far the reference is away."""
        pairs = list(zip(tensors(readouts), tensors(wanted), strict=False))
        if len(tensors(readouts)) != len(tensors(wanted)) or any(own.shape[1:] != one.shape for own, one in pairs):
            shapes = ", ".join(str(list(one.shape)) for one in tensors(wanted))
            own_shapes = ", ".join(str(list(own.shape[1:])) for own, _ in pairs)
            raise DataError(f"the reference gives {shapes}, the spiking network {own_shapes}; they must have the same outputs and classes")
        columns = [torch.cat([(own - one).square().flatten(1).sum(1), one.square().sum()[None]]) for own, one in pairs]
        self.away = self.away + torch.stack(columns, 1).cpu()
        if chosen is not None and labels is not None:
            answer = first(wanted).argmax(1)
            self.reference_right += int((answer == labels).sum())
            self.agree += (chosen == answer).flatten(1).sum(1).cpu()

    def share(self, fabric: Fabric) -> None:
        """Add up what all processes counted."""
        sites = [site.name for site in self.network.sites]
        own = [
            self.samples,
            self.labels,
            self.reference_right,
            *self.right.tolist(),
            *self.agree.tolist(),
            *(self.spikes.get(site, 0) for site in sites),
        ]
        total = summed(fabric, own)
        self.samples, self.labels, self.reference_right, *rest = total
        count = len(self.steps)
        self.right, self.agree = torch.tensor(rest[:count]), torch.tensor(rest[count : 2 * count])
        self.spikes = dict(zip(sites, rest[2 * count :], strict=True))
        self.neurons = {site.name: math.prod(site.shape) for site in self.network.sites}
        if self.source is not None:
            # A process without a batch does not know yet how many outputs there are.
            output = next(node for node in self.network.network.graph.nodes if node.op == "output")
            outputs = len(places(output.args[0]))
            # Some devices have no double precision.
            kind = torch.float32 if fabric.device.type == "mps" else torch.float64
            own_away = self.away.to(fabric.device, kind).expand(-1, outputs).contiguous()
            self.away = cast(Tensor, fabric.all_reduce(own_away, reduce_op="sum")).cpu()

    def _chunks(self, images: Tensor, labels: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        size = max(1, CHUNK // (images[0].numel() * self.network.steps))
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        parts = torch.split(images, size)
        return list(zip(parts, [None] * len(parts) if labels is None else torch.split(labels, size), strict=True))

    def report(self, snn: SpikingNetwork, seconds: float, settings: dict[str, Any]) -> Report:
        def percent(counts: Tensor, whole: int = self.labels) -> dict[int, float]:
            return {step: 100 * count / whole for step, count in zip(self.steps, counts.tolist(), strict=True)} if whole else {}

        away = (self.away[:-1] / self.away[-1].clamp_min(SMALLEST)).sqrt().amax(1)
        slots = self.samples * self.network.steps
        return Report(
            samples=self.samples,
            steps=self.steps,
            accuracy=percent(self.right),
            reference_accuracy=None if self.source is None or not self.labels else 100 * self.reference_right / self.labels,
            agreement={} if self.source is None else percent(self.agree),
            latency={step: network.latency // network.steps * step for network, steps in self.networks for step in steps},
            rates={site: total / (self.neurons[site] * slots) for site, total in self.spikes.items()},
            method=copy.deepcopy(snn.method),
            provenance=copy.deepcopy(snn.provenance),
            seconds=seconds,
            settings=settings,
            deviation={} if self.source is None else percent(away, 1),
            members=snn.members,
        )
