"""What a step of fine-tuning costs against a training step of the source network: time and memory, as ratios of one run.

    python bench/tuning_step.py [--model fast_cnn] [--steps 1 2 4] [--batch 128] [--precision bf16]

Time is the median of interleaved repetitions; memory is what autograd keeps for the backward pass (parameters not
counted), which is where the two differ. One line of JSON with versions and machine at the end. Two CPU cores, 2 minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quickspike as qs
from quickspike.models import load_model
from quickspike.provenance import commit, machine, versions


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="fast_cnn")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (options.batch,))
    source = load_model(options.model)
    networks: dict[str, nn.Module] = {"source": load_model(options.model).train().requires_grad_(True)}
    for steps in options.steps:
        snn = qs.convert(source, images, "ultra_low_latency", steps=steps).train()
        for neuron in snn.neurons().values():
            neuron.threshold.requires_grad_(True)
            neuron.leak.requires_grad_(True)
        networks[f"T = {steps}"] = snn
    forwards, optimisers = {}, {}
    for name, network in networks.items():
        network.to(memory_format=torch.channels_last)

        def forward(network: nn.Module = network) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
                return F.cross_entropy(network(images).float(), labels)

        forwards[name] = forward
        optimisers[name] = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-4)
    memory = {name: kept_bytes(forward, list(networks[name].parameters())) for name, forward in forwards.items()}
    times: dict[str, list[float]] = {name: [] for name in networks}
    for repetition in range(options.repetitions + 1):
        for name, forward in forwards.items():
            started = time.perf_counter()
            forward().backward()
            optimisers[name].step()
            optimisers[name].zero_grad()
            if repetition:
                times[name].append(time.perf_counter() - started)
    base = statistics.median(times["source"])
    rows = {
        name: {
            "time_ratio": round(statistics.median(times[name]) / base, 3),
            "spread": [round(min(times[name]) / base, 3), round(max(times[name]) / base, 3)],
            "memory_ratio": round(memory[name] / memory["source"], 3),
        }
        for name in networks
    }
    for name, row in rows.items():
        print(
            f"{name:>8}: time {row['time_ratio']:.2f} ({row['spread'][0]:.2f} to {row['spread'][1]:.2f}), memory {row['memory_ratio']:.2f}"
        )
    print(json.dumps({"rows": rows, "options": vars(options), "commit": commit(), "versions": versions(), "machine": machine()}))


if __name__ == "__main__":
    main()
