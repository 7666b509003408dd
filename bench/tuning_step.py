"""What a step of fine-tuning costs against a training step of the source network: time and memory, as ratios of one run.

    python bench/tuning_step.py [--model fast_cnn] [--steps 1 2 4] [--batch 128] [--precision bf16] [--out FILE.json]

Time is the median of interleaved repetitions; memory is what autograd keeps for the backward pass (parameters not
counted), which is where they differ. Other simulators are timed too where they are installed (pip install
'quickspike[bench]'; see peers.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import peers
from timing import interleaved, save
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import quickspike as qs
from quickspike.models import load_model


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fast_cnn")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (options.batch,))
    source = load_model(options.model)
    own = load_model(options.model).train().requires_grad_(True)
    networks: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {"source": (own, own)}
    missing = dict[str, str]()
    for steps in options.steps:
        snn = qs.convert(source, images, "ultra_low_latency", steps=steps).train()
        for neuron in snn.neurons().values():
            neuron.threshold.requires_grad_(True)
            neuron.leak.requires_grad_(True)
        networks[f"T = {steps}"] = snn, snn
        others, missing = peers(fuse(source.eval()), steps, images[:16])
        networks |= {f"T = {steps}, {name}": (peer.network.train(), peer.run) for name, peer in others.items()}
    forwards, timed = {}, {}
    for name, (network, run) in networks.items():
        network.to(memory_format=torch.channels_last)
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimiser = torch.optim.Adam(parameters, lr=1e-4)

        def forward(run: Callable[[Tensor], Tensor] = run) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
                return F.cross_entropy(run(images).float(), labels)

        def step(forward: Callable[[], Tensor] = forward, optimiser: torch.optim.Optimizer = optimiser) -> None:
            forward().backward()
            optimiser.step()
            optimiser.zero_grad()

        forwards[name], timed[name] = forward, step
    memory = {name: kept_bytes(forward, list(networks[name][0].parameters())) for name, forward in forwards.items()}
    rows = {
        name: {**times, "memory_ratio": round(memory[name] / memory["source"], 3)}
        for name, times in interleaved(timed, options.repetitions).items()
    }
    for name, row in rows.items():
        print(f"{name:>30}: time {row['ratio']:.2f} ({row['least']:.2f} to {row['largest']:.2f}), memory {row['memory_ratio']:.2f}")
    for peer, why in missing.items():
        print(f"left out: {peer}, {why}")
    save(options.out, rows, options, left_out=missing)


if __name__ == "__main__":
    main()
