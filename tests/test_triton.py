"""The kernels for GPUs: run by Triton's interpreter on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import quickspike as qs
from quickspike.models import load_model
from quickspike.simulation import simulate

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here; the interpreter runs the same kernels")


@needs_triton
@pytest.mark.parametrize("place", ["interpreter", pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu])])
def test_the_kernels(place: str) -> None:
    cases = Path(__file__).with_name("triton_cases.py")
    environment = os.environ | {"TRITON_INTERPRET": "1" if place == "interpreter" else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert found.returncode == 0, found.stdout[-4000:]
    assert " passed" in found.stdout
    assert "skipped" not in found.stdout


KERNELS = {
    "forward": {"resume": False, "keep": True, "single_height": False},
    "backward": {"triangular": True, "unscaled": False, "single_height": False},
}
KINDS = {"number": "i32", "channels": "i32", "inner": "i32", "steps": "i32", "width": "fp32", "scale": "fp32"}


@needs_triton
@pytest.mark.parametrize("number", [None, 1], ids=["many", "one"])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_places_are_counted_in_64_bits(name: str, constant: bool, number: int | None) -> None:
    """T rows of many neurons may hold more than 2^31 numbers; such arrays are too large to try."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quickspike import triton_loops

    kernel: Any = getattr(triton_loops, name)
    fixed: dict[str, Any] = {"constant": constant, "single_v0": False, "single_theta": False, "single_leak": False, "size": 1024}
    fixed |= KERNELS[name]
    if number is not None:
        fixed["number"] = number  # what Triton makes of a 1
    signature = {argument: "constexpr" if argument in fixed else KINDS.get(argument, "*fp32") for argument in kernel.arg_names}
    places = {(kernel.arg_names.index(argument),): value for argument, value in fixed.items()}
    # Without a GPU, as far as the first intermediate form.
    program = triton.compile(ASTSource(kernel, signature, constexprs=places), target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    kinds = re.findall(r"arith\.muli [^:]*: (\S+)", program)
    assert kinds
    assert all(kind == "i64" or kind.endswith("xi64>") for kind in kinds), kinds


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("device", range(max(1, torch.cuda.device_count())))
def test_the_fused_engine_on_a_gpu(device: int) -> None:
    """Also on one that is not the current device."""
    torch.manual_seed(0)
    images = torch.randn(6, 3, 32, 32)
    snn = qs.convert(load_model("resnet20,width=4"), images, "threshold_balancing", steps=4).to(f"cuda:{device}")
    before = copy.deepcopy(snn.state_dict())
    fast, plain = qs.accelerate(snn, "fused"), qs.accelerate(snn, "reference")
    assert qs.accelerate(snn).provenance["engine"]["name"] == "fused"
    images = images.to(f"cuda:{device}").contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        found, wanted = simulate(fast, images), simulate(plain, images)
        assert torch.equal(fast(images), found.logits[-1])
    assert all(torch.equal(counts, found.spikes[site]) for site, counts in wanted.spikes.items())
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in snn.state_dict().items())
