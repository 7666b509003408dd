"""Accuracy after each step, agreement with the source network, and firing rates, from one pass over labelled images."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from quickspike.capture import check_batch, copy_of
from quickspike.conversion import SpikingNetwork
from quickspike.data import Batches, labelled_batches
from quickspike.errors import DataError, OptionError
from quickspike.memory import keep_freed_memory
from quickspike.provenance import machine, versions
from quickspike.simulation import simulate

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from quickspike.engines import Engine

CHUNK = 400_000
"""Input values times steps that are simulated at once: small enough for the processor's caches, large enough to fill it."""


@dataclass(frozen=True)
class Report:
    """What an evaluation measured. Accuracies and agreements in percent, keyed by the number of steps."""

    samples: int
    steps: tuple[int, ...]
    accuracy: dict[int, float]
    """Top-1 accuracy of the readout after that many steps."""
    reference_accuracy: float | None
    """Top-1 accuracy of the source network on the same images; None without a reference."""
    agreement: dict[int, float]
    """Share of images on which spiking and source network choose the same class; empty without a reference."""
    rates: dict[str, float]
    """Mean spikes per neuron and step at each site over the whole run, in [0, 1]."""
    latency: dict[int, int]
    """Steps until the answer is there: T itself, or depth x T where layers wait for whole windows."""
    method: dict[str, Any]
    provenance: dict[str, Any]
    seconds: float
    """Wall-clock time of the evaluation."""
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data; keys of `accuracy` and `agreement` become strings."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data["accuracy"] = {str(step): value for step, value in self.accuracy.items()}
        data["agreement"] = {str(step): value for step, value in self.agreement.items()}
        data["latency"] = {str(step): value for step, value in self.latency.items()}
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
        return Fabric(accelerator=device, devices=devices, num_nodes=nodes, strategy=strategy, precision=precision)  # type: ignore[arg-type]
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OptionError(f"device {device!r} x {devices} with precision {precision!r} is not to be had: {reason}") from error


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
) -> Report:
    """Measure `snn` on labelled images.

    All step counts come from one simulation of the largest, except where layers wait for whole windows: such a network
    is simulated for each.

    Args:
        snn: the spiking network; not modified.
        data: batches of (images `[B, ...]`, labels `[B]`).
        reference: the source network, for its accuracy and the agreement with it; not modified.
        steps: numbers of steps to report, by default 1, 2, 4, ... up to the network's own T. More than T is allowed:
            the network then runs longer than its thresholds were fitted for.
        device: see `make_fabric`.
        precision: see `make_fabric`.
        fabric: launched processes that share the batches between them, each sample in exactly one; instead of `device`
            and `precision`, in single precision. Every process gets the report of all.
        engine: measure a copy made for this engine, see `quickspike.engines.accelerate`; None runs `snn` as it is.
        bits: of a weight (engine=integer, count).

    Raises:
        DataError: no labels, labels out of range, no images, or images that do not fit.
        OptionError: a number of steps below 1, or an engine that cannot run this network.
    """
    chosen = _steps(steps, snn.steps)
    # Processes that are given may train in mixed precision; figures are those of the weights as they are.
    lower = contextlib.nullcontext() if fabric is not None else None
    fabric = fabric or make_fabric(device, precision)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    runs = [(step,) for step in chosen] if snn.synchronous else [chosen]
    networks = [(snn.with_steps(steps[-1]), steps) for steps in runs]
    for network, _ in networks:
        fabric.to_device(network)
    if engine is not None:
        from quickspike.engines import accelerate

        networks = [(accelerate(network, engine, bits=bits), steps) for network, steps in networks]
    source = None if reference is None else fabric.to_device(copy_of(reference))
    tally = _Tally(networks, source)
    started = time.perf_counter()
    with torch.inference_mode(), lower or fabric.autocast():
        for number, (images, labels) in enumerate(labelled_batches(data), 1):
            check_labels(images, labels, number)
            if number % fabric.world_size != fabric.global_rank:
                continue
            tally.add(fabric.to_device(images), fabric.to_device(labels), number)
    tally.share(fabric)
    if tally.samples == 0:
        raise DataError("the evaluation data is empty; give at least one batch of (images, labels)")
    settings = {
        "device": str(fabric.device),
        "processes": fabric.world_size,
        "precision": "32-true" if lower else precision,
        "engine": networks[-1][0].provenance.get("engine"),
        "versions": versions(),
        "machine": machine(),
    }
    return tally.report(snn, time.perf_counter() - started, settings)


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
    with torch.inference_mode():
        for number, (images, labels) in enumerate(labelled_batches(data), 1):
            check_labels(images, labels, number)
            if number % fabric.world_size == fabric.global_rank:
                answers = _fitting(partial(network, fabric.to_device(images)), "the network", images, number).argmax(1)
                right += int((answers == fabric.to_device(labels)).sum())
                count += len(images)
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


def check_labels(images: Tensor, labels: Tensor | None, number: int) -> None:
    """Raise DataError unless batch `number` is sound and has one whole number for every image."""
    check_batch(images, f"evaluation batch {number}")
    if labels is None:
        raise DataError(f"evaluation batch {number} has no labels; give (images, labels) pairs")
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        expected = f"{len(images)} whole numbers"
        raise DataError(f"evaluation batch {number}: labels must be {expected}, got {labels.dtype} {list(labels.shape)}")


def _fitting(forward: Callable[[], Any], what: str, images: Tensor, number: int) -> Any:
    try:
        return forward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"evaluation batch {number}: {what} cannot take images {list(images.shape)}: {reason}") from error


class _Tally:
    """Counts over the batches seen so far."""

    def __init__(self, networks: list[tuple[SpikingNetwork, tuple[int, ...]]], source: nn.Module | None) -> None:
        self.networks, self.source = networks, source
        self.network, steps = networks[-1][0], tuple(step for _, own in networks for step in own)
        self.steps = steps
        self.samples = 0
        self.right = torch.zeros(len(steps), dtype=torch.int64)
        self.agree = torch.zeros(len(steps), dtype=torch.int64)
        self.reference_right = 0
        self.spikes: dict[str, int] = {}
        self.neurons: dict[str, int] = {}
        for network, _ in networks:
            if len(network.input_shape) == 3:
                network.to(memory_format=torch.channels_last)

    def add(self, images: Tensor, labels: Tensor, number: int) -> None:
        """Count one batch, simulated in chunks that bound the memory."""
        for part, part_labels in self._chunks(images, labels):
            runs = [_fitting(partial(simulate, network, part), "the spiking network", part, number) for network, _ in self.networks]
            run = runs[-1]
            if run.logits.ndim != 3:
                raise DataError(f"the network gives {list(run.logits.shape[1:])} per batch; accuracy needs logits [B, K]")
            classes = run.logits.shape[2]
            if bool((part_labels < 0).any()) or bool((part_labels >= classes).any()):
                found = f"{int(part_labels.min())}..{int(part_labels.max())}"
                raise DataError(f"evaluation batch {number}: labels {found} do not fit a network with {classes} classes (0..{classes - 1})")
            pairs = zip(runs, self.networks, strict=True)
            chosen = torch.cat([one.logits.argmax(2)[[step - 1 for step in steps]] for one, (_, steps) in pairs])
            self.right += (chosen == part_labels).sum(1).cpu()
            self.samples += len(part)
            for site, counts in run.spikes.items():
                self.spikes[site] = self.spikes.get(site, 0) + int(counts.sum())
            if self.source is not None:
                logits = _fitting(partial(self.source, part), "the reference", part, number)
                if logits.shape != run.logits.shape[1:]:
                    shapes = f"{list(logits.shape)}, the spiking network {list(run.logits.shape[1:])}"
                    raise DataError(f"the reference gives logits {shapes}; they must have the same classes")
                answer = logits.argmax(1)
                self.reference_right += int((answer == part_labels).sum())
                self.agree += (chosen == answer).sum(1).cpu()

    def share(self, fabric: Fabric) -> None:
        """Add up what all processes counted."""
        sites = [site.name for site in self.network.sites]
        own = [
            self.samples,
            self.reference_right,
            *self.right.tolist(),
            *self.agree.tolist(),
            *(self.spikes.get(site, 0) for site in sites),
        ]
        total = summed(fabric, own)
        self.samples, self.reference_right, *rest = total
        count = len(self.steps)
        self.right, self.agree = torch.tensor(rest[:count]), torch.tensor(rest[count : 2 * count])
        self.spikes = dict(zip(sites, rest[2 * count :], strict=True))
        self.neurons = {site.name: math.prod(site.shape) for site in self.network.sites}

    def _chunks(self, images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = max(1, CHUNK // (images[0].numel() * self.network.steps))
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        return list(zip(torch.split(images, size), torch.split(labels, size), strict=True))

    def report(self, snn: SpikingNetwork, seconds: float, settings: dict[str, Any]) -> Report:
        def percent(counts: Tensor) -> dict[int, float]:
            return {step: 100 * count / self.samples for step, count in zip(self.steps, counts.tolist(), strict=True)}

        slots = self.samples * self.network.steps
        return Report(
            samples=self.samples,
            steps=self.steps,
            accuracy=percent(self.right),
            reference_accuracy=None if self.source is None else 100 * self.reference_right / self.samples,
            agreement={} if self.source is None else percent(self.agree),
            latency={step: network.latency // network.steps * step for network, steps in self.networks for step in steps},
            rates={site: total / (self.neurons[site] * slots) for site, total in self.spikes.items()},
            method=copy.deepcopy(snn.method),
            provenance=copy.deepcopy(snn.provenance),
            seconds=seconds,
            settings=settings,
        )
