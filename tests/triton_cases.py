"""The kernels for GPUs against the reference. `test_triton.py` runs this file in processes of its own: whether Triton
interprets is settled when it is imported.
"""

from __future__ import annotations

import contextlib
import os

import pytest
import torch

from quickspike import kernels
from quickspike.neuron import _Rule, _Scan, integrate, unfold
from test_kernels import SURROGATES, both, case, check


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "cuda"
    monkeypatch.setattr(kernels, "_on_gpu", lambda x: True)
    return "cpu"


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize(("shape", "channels_last"), [((3, 5), False), ((4, 6, 5, 7), False), ((4, 6, 5, 7), True), ((3, 700, 2, 1), True)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_kernels_are_the_reference(shape: tuple[int, ...], channels_last: bool, per_channel: bool, surrogate: str, device: str) -> None:
    currents, parameters = case(shape, 3, per_channel)
    if channels_last:
        currents = currents.contiguous(memory_format=torch.channels_last)
    moved = tuple(parameter.to(device) for parameter in parameters)
    check(*both(currents.to(device), moved, _Rule(3, False, False, SURROGATES[surrogate])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_boundaries_and_precision(constant: bool, strict: bool, dtype: torch.dtype, device: str) -> None:
    currents, parameters = case((2, 4, 3, 3), 1 if constant else 5, per_channel=True)
    currents = currents.to(device, dtype).contiguous(memory_format=torch.channels_last)
    moved = tuple(parameter.to(device) for parameter in parameters)
    check(*both(currents, moved, _Rule(5, constant, strict, SURROGATES["triangular"])))


def test_bytes_and_going_on_from_potentials(device: str) -> None:
    currents, (v, theta, leak, amplitude) = case((2, 4, 3, 3), 6, per_channel=True)
    moved = [tensor.to(device) for tensor in (v, theta, leak, amplitude)]
    x, rule = currents.to(device), _Rule(3, False, False, SURROGATES["boxcar"])
    whole, last = integrate(currents, v, theta, leak, amplitude, 6)
    first, state = kernels.fire_on(x[:6], None, *moved, rule, torch.uint8)
    second, state = kernels.fire_on(x[6:], state, *moved, rule, torch.uint8)
    assert torch.equal(torch.cat([first, second]).cpu(), whole.ne(0).to(torch.uint8))
    assert torch.equal(state.cpu(), last)


def test_they_run_on_the_device_of_their_tensors(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        seen.append(x)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    currents, parameters = case((2, 4), 3, per_channel=True)
    x, (v, theta, leak, amplitude) = currents.to(device).requires_grad_(True), (parameter.to(device) for parameter in parameters)
    rule = _Rule(3, False, False, SURROGATES["boxcar"])
    kernels.fused(x, v, theta, leak, amplitude, rule).sum().backward()
    kernels.count(x, v, theta, leak, rule, 1, torch.uint8)
    assert [one.data_ptr() for one in seen] == [x.data_ptr()] * 3


@pytest.mark.parametrize("divisor", [1, 7])
def test_counts(divisor: int, device: str) -> None:
    currents, (v, theta, leak, _) = case((4, 4, 3, 3), 1, per_channel=True)
    rule = _Rule(7, True, True, SURROGATES["boxcar"])
    out, _ = _Scan.apply(currents / divisor, v, theta, leak, torch.ones_like(theta), rule)
    wanted = unfold(out, 7).ne(0).sum(0).to(torch.uint8)
    moved = [tensor.to(device) for tensor in (v, theta, leak)]
    assert torch.equal(kernels.count(currents.to(device), *moved, rule, divisor, torch.uint8).cpu(), wanted)
