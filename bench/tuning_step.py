"""What a step of fine-tuning costs against a training step of the source network: time and memory, as ratios of one run.

    python bench/tuning_step.py [--model fast_cnn] [--steps 1 2 4] [--batch 128] [--precision bf16|fp32] [--out FILE.json]

Time is the median of interleaved repetitions. Memory is told twice: *peak*, by how much the resident memory of a process of
its own grows at most during its second step, and *kept*, the bytes that autograd keeps for the backward pass (parameters not
counted). Beside them a training step of the source network with the activations of `qcfs`, in compiled loops and without.
Training steps of other simulators, each with its own surrogate gradient, are measured too where they are installed
(pip install 'quickspike[bench]'; see peers.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.nn.functional as F
from peers import peers
from timing import add_out, in_own_process, interleaved, save
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import quickspike as qs
from quickspike import kernels
from quickspike.conversion import prepare
from quickspike.data import ImageStream
from quickspike.graph import trace
from quickspike.method import create
from quickspike.models import load_model
from quickspike.processor import has_bfloat16

SOURCE = "source"
QCFS, REFERENCE = "qcfs", "qcfs without compiled loops"


def kept_bytes(forward: Callable[[], Tensor], parameters: list[nn.Parameter]) -> int:
    """Bytes of all distinct tensors that autograd keeps for the backward pass of one forward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(found.values())


@dataclass(frozen=True)
class Training:
    """A network in training, and what is done with it."""

    network: nn.Module
    forward: Callable[[], Tensor]
    step: Callable[[], None]


def training(network: nn.Module, run: Callable[[Tensor], Tensor], batch: int, precision: str) -> Training:
    """A step of Adam on drawn images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    network.train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam([parameter for parameter in network.parameters() if parameter.requires_grad], lr=1e-4)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return F.cross_entropy(run(images).float(), labels)

    def step() -> None:
        forward().backward()
        optimiser.step()
        optimiser.zero_grad()

    return Training(network, forward, step)


def with_qcfs(model: str) -> nn.Module:
    """The source network with staircases for activations, ready to train."""
    torch.manual_seed(0)
    few, method = torch.randn(16, 3, 32, 32), create("qcfs", granularity="channel")
    ann = prepare(trace(load_model(model), few, trainable=True), method)
    method.fit(ann, ImageStream(few))
    return ann.module.requires_grad_(True)


def without_loops(step: Callable[[], None]) -> Callable[[], None]:
    """The same step, with staircases as torch computes them."""

    def slow() -> None:
        with mock.patch.object(kernels, "staircase_applies", return_value=False):
            step()

    return slow


def trained(model: str, steps: int, batch: int, precision: str) -> tuple[dict[str, Training], dict[str, str]]:
    """(training of the source network, of ours for `steps` and of every peer's, by name; why peers are missing)."""
    torch.manual_seed(0)
    source = load_model(model)
    few = torch.randn(16, 3, 32, 32)
    own = load_model(model).requires_grad_(True)
    snn = qs.convert(source, few, "ultra_low_latency", steps=steps)
    for neuron in snn.neurons().values():
        neuron.threshold.requires_grad_(True)
        neuron.leak.requires_grad_(True)
    others, missing = peers(fuse(source.eval()), steps, few)
    networks: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {SOURCE: (own, own), f"T = {steps}": (snn, snn)}
    networks |= {f"T = {steps}, {name}": (peer.network, peer.run) for name, peer in others.items()}
    networks |= {name: (network, network) for name in (QCFS, REFERENCE) for network in [with_qcfs(model)]}
    found = {name: training(*network, batch, precision) for name, network in networks.items()}
    found[REFERENCE] = replace(found[REFERENCE], step=without_loops(found[REFERENCE].step))
    return found, missing


def one_step(name: str, model: str, steps: int, batch: int, precision: str) -> Callable[[], None]:
    """A step of one of them, for a process of its own."""
    return trained(model, steps, batch, precision)[0][name].step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fast_cnn")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    default = "bf16" if has_bfloat16() else "fp32"
    parser.add_argument("--precision", choices=["bf16", "fp32"], default=default, help="[default: bf16 if the processor has it]")
    add_out(parser)
    options = parser.parse_args()
    all_of_them, peak, missing = dict[str, Training](), dict[str, int](), dict[str, str]()
    for steps in options.steps:
        settings = (options.model, steps, options.batch, options.precision)
        found, missing = trained(*settings)
        for name in found.keys() - peak.keys():
            peak[name] = in_own_process(one_step, name, *settings, earlier=1).grown
        all_of_them = {**found, **all_of_them}
    kept = {name: kept_bytes(one.forward, list(one.network.parameters())) for name, one in all_of_them.items()}
    times = interleaved({name: all_of_them[name].step for name in (SOURCE, *(all_of_them.keys() - {SOURCE}))}, options.repetitions)
    rows = {}
    for name in all_of_them:
        rows[name] = {**times[name], "peak_bytes": peak[name], "kept_bytes": kept[name]}
        rows[name] |= {f"{what}_ratio": round(bytes_[name] / bytes_[SOURCE], 3) for what, bytes_ in (("peak", peak), ("kept", kept))}
        row = rows[name]
        shown = f"time {row['ratio']:.2f} ({row['least']:.2f} to {row['largest']:.2f})"
        print(f"{name:>30}: {shown}, peak memory {row['peak_ratio']:.2f}, kept for the backward pass {row['kept_ratio']:.2f}")
    for peer, why in missing.items():
        print(f"left out: {peer}, {why}")
    save(options.out, rows, options, left_out=missing)


if __name__ == "__main__":
    main()
