"""The scan over time as Triton kernels for GPUs: the same arithmetic as `loops.py`, one program per block of neurons.

Importing this module needs triton; `kernels.py` does so on first use. Arrays are as there: `[T, N]` in the order of
memory, parameters of one value or one per channel, neighbours in a channel `inner` apart.
"""
# mypy: disable-error-code="no-untyped-def, misc, no-untyped-call, untyped-decorator, index, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _parameter(pointer, channel, single: tl.constexpr):
    return tl.load(pointer + (channel * 0 if single else channel))


@triton.jit
def forward(
    x,
    out,
    state,
    v0,
    theta,
    fires_at,
    leak,
    height,
    number,
    channels,
    inner,
    steps,
    constant: tl.constexpr,
    resume: tl.constexpr,
    keep: tl.constexpr,
    single_v0: tl.constexpr,
    single_theta: tl.constexpr,
    single_leak: tl.constexpr,
    single_height: tl.constexpr,
    size: tl.constexpr,
):
    """`loops.forward`; `height` holds numbers in the type of `out`."""
    row = tl.cast(number, tl.int64)  # T rows may hold more than 2^31 numbers
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < number
    channel = (place // inner) % channels
    th, fa = _parameter(theta, channel, single_theta), _parameter(fires_at, channel, single_theta)
    lk, high = _parameter(leak, channel, single_leak), _parameter(height, channel, single_height)
    v = tl.load(state + place, inside, 0.0) if resume else _parameter(v0, channel, single_v0) + tl.zeros((size,), tl.float32)
    for t in range(steps):
        current = tl.load(x + (place if constant else place + t * row), inside, 0.0).to(tl.float32)
        m = current + lk * v
        spikes = m >= fa
        v = m - tl.where(spikes, th, 0.0)
        tl.store(out + place + t * row, tl.where(spikes, high, 0).to(out.dtype.element_ty), inside)
    if keep:
        tl.store(state + place, v, inside)


@triton.jit
def count(
    x,
    out,
    v0,
    theta,
    fires_at,
    leak,
    number,
    channels,
    inner,
    steps,
    divisor,
    single_v0: tl.constexpr,
    single_theta: tl.constexpr,
    single_leak: tl.constexpr,
    size: tl.constexpr,
):
    """`loops.count`."""
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < number
    channel = (place // inner) % channels
    th, fa = _parameter(theta, channel, single_theta), _parameter(fires_at, channel, single_theta)
    lk = _parameter(leak, channel, single_leak)
    v = _parameter(v0, channel, single_v0) + tl.zeros((size,), tl.float32)
    counts = tl.zeros((size,), tl.int32)
    # A plain division may be an approximate one on a GPU.
    current = tl.div_rn(tl.load(x + place, inside, 0.0).to(tl.float32), divisor + tl.zeros((size,), tl.float32))
    for _ in range(steps):
        m = current + lk * v
        spikes = m >= fa
        v = m - tl.where(spikes, th, 0.0)
        counts += spikes.to(tl.int32)
    tl.store(out + place, counts.to(out.dtype.element_ty), inside)


@triton.jit
def backward(
    x,
    g,
    dx,
    potentials,
    v0,
    theta,
    fires_at,
    leak,
    amplitude,
    sums,
    number,
    channels,
    inner,
    steps,
    width,
    scale,
    constant: tl.constexpr,
    triangular: tl.constexpr,
    unscaled: tl.constexpr,
    single_v0: tl.constexpr,
    single_theta: tl.constexpr,
    single_leak: tl.constexpr,
    single_height: tl.constexpr,
    size: tl.constexpr,
):
    """`loops.backward`; `potentials` `[T, N]` is room to work in, `sums` `[4, N]` takes every neuron's share."""
    row = tl.cast(number, tl.int64)  # T rows may hold more than 2^31 numbers
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < number
    channel = (place // inner) % channels
    th, fa = _parameter(theta, channel, single_theta), _parameter(fires_at, channel, single_theta)
    lk, high = _parameter(leak, channel, single_leak), _parameter(amplitude, channel, single_height)
    begin = _parameter(v0, channel, single_v0) + tl.zeros((size,), tl.float32)
    inverse = 1.0 / th
    factor = (scale if unscaled else high * scale) * inverse
    v = begin
    for t in range(steps):
        current = tl.load(x + (place if constant else place + t * row), inside, 0.0).to(tl.float32)
        m = current + lk * v
        v = m - tl.where(m >= fa, th, 0.0)
        tl.store(potentials + place + t * row, m, inside)
    zero = tl.zeros((size,), tl.float32)
    dv, total, to_theta, to_leak, to_height = zero, zero, zero, zero, zero
    for back in range(steps):
        t = steps - 1 - back
        m = tl.load(potentials + place + t * row, inside, 0.0)
        gradient = tl.load(g + place + t * row, inside, 0.0).to(tl.float32)
        distance = tl.abs(m * inverse - 1.0) * width
        slope = tl.maximum(1.0 - distance, 0.0) if triangular else tl.where(distance < 1.0, 1.0, 0.0)
        e = slope * gradient * factor
        spikes = m >= fa
        to_theta -= e * m * inverse + tl.where(spikes, dv, 0.0)
        to_height += gradient if unscaled else tl.where(spikes, gradient, 0.0)
        dv += e
        # Compared as a tensor: the interpreter of Triton 3.9 makes a number of `inside & (t > 0)`, which is no mask.
        before = tl.load(potentials + place + (t - 1) * row, inside & (t + tl.zeros((size,), tl.int32) > 0), 0.0)
        earlier = tl.where(t > 0, before - tl.where(before >= fa, th, 0.0), begin)
        to_leak += dv * earlier
        if constant:
            total += dv
        else:
            tl.store(dx + place + t * row, dv.to(dx.dtype.element_ty), inside)
        dv = lk * dv
    if constant:
        tl.store(dx + place, total.to(dx.dtype.element_ty), inside)
    tl.store(sums + place, to_theta, inside)
    tl.store(sums + place + row, to_leak, inside)
    tl.store(sums + place + 2 * row, to_height, inside)
    tl.store(sums + place + 3 * row, dv, inside)


# Launching them, on the device of the tensors, which need not be the current one: elsewhere their addresses mean nothing.


def _grid(number):
    return (triton.cdiv(number, BLOCK),)


def _flat(parameter):
    return parameter.detach().float().reshape(-1).contiguous()


def fire(current, out, state, resume, v, theta, fires_at, leak, height, channels, inner, rule):
    """Fill `out`; see `kernels.fire`. `height` is rounded to the type of `out` already."""
    number = out.numel() // rule.steps
    # Without state its pointer is not used. No fused multiply-add: it rounds once where all other engines round twice.
    with torch.cuda.device_of(current):
        forward[_grid(number)](
            current,
            out,
            current if state is None else state,
            _flat(v),
            _flat(theta),
            _flat(fires_at),
            _flat(leak),
            _flat(height),
            number,
            channels,
            inner,
            rule.steps,
            constant=rule.constant,
            resume=resume,
            keep=state is not None,
            single_v0=v.numel() == 1,
            single_theta=theta.numel() == 1,
            single_leak=leak.numel() == 1,
            single_height=height.numel() == 1,
            size=BLOCK,
            enable_fp_fusion=False,
        )


def count_spikes(current, out, v, theta, fires_at, leak, channels, inner, divisor, rule):
    """Fill `out`; see `kernels.count`."""
    with torch.cuda.device_of(current):
        count[_grid(out.numel())](
            current,
            out,
            _flat(v),
            _flat(theta),
            _flat(fires_at),
            _flat(leak),
            out.numel(),
            channels,
            inner,
            rule.steps,
            float(divisor),
            single_v0=v.numel() == 1,
            single_theta=theta.numel() == 1,
            single_leak=leak.numel() == 1,
            size=BLOCK,
            enable_fp_fusion=False,
        )


def gradients(current, gradient, dx, v, theta, fires_at, leak, amplitude, channels, inner, rule):
    """Fill `dx`; every neuron's share of the gradients to theta, leak, amplitude and v0, `[4, N]`."""
    number = gradient.numel() // rule.steps
    potentials = current.new_empty((rule.steps, number), dtype=torch.float32)
    sums = current.new_empty((4, number), dtype=torch.float32)
    surrogate = rule.surrogate
    with torch.cuda.device_of(current):
        backward[_grid(number)](
            current,
            gradient,
            dx,
            potentials,
            _flat(v),
            _flat(theta),
            _flat(fires_at),
            _flat(leak),
            _flat(amplitude),
            sums,
            number,
            channels,
            inner,
            rule.steps,
            1 / surrogate.width,
            surrogate.scale,
            constant=rule.constant,
            triangular=surrogate.shape == "triangular",
            unscaled=surrogate.unscaled,
            single_v0=v.numel() == 1,
            single_theta=theta.numel() == 1,
            single_leak=leak.numel() == 1,
            single_height=amplitude.numel() == 1,
            size=BLOCK,
            enable_fp_fusion=False,
        )
    return sums
