"""The scan over time, and the staircase of training, as compiled loops: every current is read once, potentials stay in registers.

`loops.py` has them for the CPU (numba), `triton_loops.py` for GPUs; here they are called. They give the spikes of
`neuron.integrate`'s reference bit for bit. They take float32 and bfloat16 currents and the piecewise linear surrogates;
whatever else comes is left to the reference. Nothing is kept for the backward pass but the currents themselves:
potentials are computed again there, which is cheaper than fetching them from memory.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from quickspike.errors import ConversionError

MOST_STEPS = 4096
"""The backward loop keeps 4 KiB for every step and thread."""
SHAPES = {"triangular": 0, "boxcar": 1}


@functools.cache
def _loops() -> Any:
    """The compiled loops; None if numba is not there."""
    try:
        return importlib.import_module("quickspike.loops")
    except (ImportError, RuntimeError):  # RuntimeError: numba finds no folder for what it compiles
        return None


@functools.cache
def _triton() -> Any:
    """The kernels for GPUs; None if triton is not there."""
    try:
        return importlib.import_module("quickspike.triton_loops")
    except ImportError:
        return None


def _is_there(gpu: bool) -> bool:
    return (_triton() if gpu else _loops()) is not None


_as_constant: Any = torch.compiler.assume_constant_result
_available: Callable[[bool], bool] = _as_constant(_is_there)


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def applies(current: Tensor, parameters: Sequence[Tensor], steps: int, shape: str) -> bool:
    """True if the compiled loops can take this: float32 or bfloat16, parameters single or per channel."""
    return shape in SHAPES and steps <= MOST_STEPS and _takes(current, parameters)


def _takes(current: Tensor, parameters: Sequence[Tensor]) -> bool:
    if current.device.type not in ("cpu", "cuda") or current.dtype not in (torch.float32, torch.bfloat16):
        return False
    if not current.numel():
        return False
    channels = current.shape[1] if current.ndim > 1 else 0
    for parameter in parameters:
        per_channel = parameter.numel() == channels and parameter.ndim == current.ndim - 1 and parameter.shape[0] == channels
        if parameter.dtype != torch.float32 or not (parameter.numel() == 1 or per_channel):
            return False
    return _dense(current) is not None and _available(_on_gpu(current))


def _dense(x: Tensor) -> tuple[Tensor, int] | None:
    """(the tensor with axes in the order of memory, neurons between two channels there); None if it has gaps."""
    if x.is_contiguous():
        return x, math.prod(x.shape[2:])
    moved = x.movedim(1, -1)
    return (moved, 1) if moved.is_contiguous() else None


def _inner(x: Tensor) -> int:
    """Neurons between two channels in memory."""
    dense = _dense(x)
    return 1 if dense is None else dense[1]


def _bits(x: Tensor, rows: int) -> np.ndarray[Any, Any]:
    """`[rows, N]` as unsigned integers that share the memory of `x`."""
    dense = _dense(x)
    if dense is None:
        raise ConversionError(f"a tensor of shape {list(x.shape)} and strides {list(x.stride())} has gaps in memory")
    kind, unsigned = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 1: (torch.uint8, np.uint8)}[x.element_size()]
    array: np.ndarray[Any, Any] = dense[0].detach().reshape(rows, -1).view(kind).numpy().view(unsigned)
    return array


def _flat(parameter: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = parameter.detach().reshape(-1).numpy()
    return array


def _firing_level(theta: Tensor, strict: bool) -> Tensor:
    """The least potential that fires: theta, or the next number above it where firing is strict."""
    return torch.nextafter(theta.detach(), torch.full_like(theta, math.inf)) if strict else theta


def _groups(number: int, length: int) -> int:
    """Parts that `number` neurons in blocks of `length` are worked on in."""
    return -(-number // (int(_loops().GROUP) * length))


def _share_out(loop: Callable[..., None], groups: int, *arguments: Any) -> None:
    """Run a compiled loop over all groups, on as many threads as torch uses (it releases the GIL)."""
    threads = min(torch.get_num_threads(), groups)
    if threads <= 1:
        loop(0, groups, *arguments)
        return
    ends = [groups * part // threads for part in range(threads + 1)]
    tasks = [_pool(threads - 1).submit(loop, *span, *arguments) for span in itertools.pairwise(ends[1:])]
    loop(0, ends[1], *arguments)
    for task in tasks:
        task.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "quickspike")


def _empty_outputs(current: Tensor, steps: int, constant: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for the outputs, laid out as the currents are."""
    if not constant:
        return torch.empty_like(current, dtype=dtype)
    shape = (steps * current.shape[0], *current.shape[1:])
    if current.is_contiguous():
        return current.new_empty(shape, dtype=dtype)
    return current.new_empty((shape[0], *shape[2:], shape[1]), dtype=dtype).movedim(-1, 1)


def fire(
    current: Tensor,
    v: Tensor,
    theta: Tensor,
    leak: Tensor,
    amplitude: Tensor,
    rule: Any,
    dtype: torch.dtype | None = None,
    state: Tensor | None = None,
    resume: bool = False,
) -> Tensor:
    """Outputs `[T*B, ...]` without a gradient; arguments as of `fused`.

    `dtype` is that of the outputs: float32, bfloat16, or uint8 for 0 and 1 whatever the amplitude; None: the currents'.
    `state`, float32 `[B, ...]` and laid out as the currents, takes the potentials after the last step; with `resume`
    they begin as it holds them, not with `v`.
    """
    inner = _inner(current)
    out = _empty_outputs(current, rule.steps, rule.constant, dtype)
    height = (torch.ones_like(theta) if dtype == torch.uint8 else amplitude.detach()).to(out.dtype)
    channels = max(parameter.numel() for parameter in (v, theta, leak, height))
    if _on_gpu(current):
        level = _firing_level(theta, rule.strict)
        _triton().fire(current, out, state, resume, v, theta, level, leak, height, channels, inner, rule)
        return out
    heights = _bits(height.reshape(1, -1), 1).reshape(-1).astype(np.uint32)
    length = _loops().block_length(channels, inner)
    _share_out(
        _loops().forward,
        _groups(out.numel() // rule.steps, length),
        _bits(current, 1 if rule.constant else rule.steps),
        _bits(out, rule.steps),
        np.empty(0, np.float32) if state is None else _bits(state, 1)[0].view(np.float32),
        resume,
        _flat(v),
        _flat(theta),
        _flat(_firing_level(theta, rule.strict)),
        _flat(leak),
        heights,
        channels,
        inner,
        length,
        rule.steps,
        rule.constant,
        current.dtype == torch.bfloat16,
    )
    return out


def count(current: Tensor, v: Tensor, theta: Tensor, leak: Tensor, rule: Any, divisor: int, dtype: torch.dtype) -> Tensor:
    """Spikes in T steps under the constant current `[B, ...]`/divisor, `[B, ...]`, as uint8 or int32; arguments as of `fused`."""
    inner = _inner(current)
    out = _empty_outputs(current, 1, True, dtype)
    channels = max(parameter.numel() for parameter in (v, theta, leak))
    if _on_gpu(current):
        _triton().count_spikes(current, out, v, theta, _firing_level(theta, rule.strict), leak, channels, inner, divisor, rule)
        return out
    length = _loops().block_length(channels, inner)
    direct = bool((leak == 1).all() and (v >= 0).all() and (v < theta).all())
    _share_out(
        _loops().count,
        _groups(out.numel(), length),
        _bits(current, 1),
        _bits(out, 1),
        _flat(v),
        _flat(theta),
        _flat(_firing_level(theta, rule.strict)),
        _flat(leak),
        channels,
        inner,
        length,
        rule.steps,
        np.float32(divisor),
        current.dtype == torch.bfloat16,
        direct,
        direct and _whole(v, theta, rule),
    )
    return out


def _whole(v: Tensor, theta: Tensor, rule: Any) -> bool:
    """True if nothing rounds on the way, as long as the sums of currents are whole, see `loops.count_whole`."""
    steps: int = rule.steps
    if rule.strict or steps & (steps - 1) or float(theta.max()) >= 2**22 / steps:
        return False
    return bool((theta == theta.round()).all() and (v == v.round()).all())


def fire_on(
    current: Tensor, state: Tensor | None, v: Tensor, theta: Tensor, leak: Tensor, amplitude: Tensor, rule: Any, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(outputs `[T*B, ...]`, potentials `[B, ...]`) of the next steps, from the potentials `state`; arguments as of `fire`."""
    one = current if rule.constant else current[: len(current) // rule.steps]
    potentials = torch.empty_like(one, dtype=torch.float32)
    if state is not None:
        potentials.copy_(state)
    return fire(current, v, theta, leak, amplitude, rule, dtype, potentials, state is not None), potentials


def fire_signed(
    current: Tensor, state: Tensor, left: Tensor | None, theta: Tensor, leak: Tensor, amplitude: Tensor, rule: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs `[T*B, ...]`, potentials, spikes that can be taken back, `[B, ...]`) of the next steps, without a gradient, on the CPU.

    `state` are the potentials before, and so is `left`, which is 0 at the beginning; other arguments as of `fire`.
    """
    inner = _inner(current)
    out = _empty_outputs(current, rule.steps, rule.constant)
    one = current if rule.constant else current[: len(current) // rule.steps]
    potentials, rest = torch.empty_like(one, dtype=torch.float32), torch.zeros_like(one, dtype=torch.float32)
    potentials.copy_(state)
    if left is not None:
        rest.copy_(left)
    heights = [
        _bits(height.detach().to(out.dtype).reshape(1, -1), 1).reshape(-1).astype(np.uint32) for height in (amplitude, 0.0 - amplitude)
    ]
    channels = max(parameter.numel() for parameter in (theta, leak, amplitude))
    length = _loops().block_length(channels, inner)
    _share_out(
        _loops().forward_signed,
        _groups(out.numel() // rule.steps, length),
        _bits(current, 1 if rule.constant else rule.steps),
        _bits(out, rule.steps),
        _bits(potentials, 1)[0].view(np.float32),
        _bits(rest, 1)[0].view(np.float32),
        _flat(theta),
        _flat(_firing_level(theta, rule.strict)),
        _flat(leak),
        *heights,
        channels,
        inner,
        length,
        rule.steps,
        rule.constant,
        current.dtype == torch.bfloat16,
    )
    return out, potentials, rest


class _Fused(torch.autograd.Function):
    """`neuron._Scan` without the final potential, in compiled loops."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, v: Tensor, theta: Tensor, leak: Tensor, amplitude: Tensor, rule: Any) -> Tensor:
        ctx.save_for_backward(current, v, theta, leak, amplitude)
        ctx.rule = rule
        return fire(current, v, theta, leak, amplitude, rule)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        current, v, theta, leak, amplitude = ctx.saved_tensors
        found = _gradients(gradients[0], current, v, theta, leak, amplitude, ctx.rule)
        return tuple(value if need else None for value, need in zip((*found, None), ctx.needs_input_grad, strict=True))


def _gradients(
    gradient: Tensor, current: Tensor, v: Tensor, theta: Tensor, leak: Tensor, amplitude: Tensor, rule: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to current, v, theta, leak and amplitude."""
    inner = _inner(current)
    gradient = _like(gradient.to(current.dtype), current)
    dx = torch.empty_like(current)
    parameters = (theta, leak, amplitude, v)
    channels = max(parameter.numel() for parameter in parameters)
    if _on_gpu(current):
        level = _firing_level(theta, rule.strict)
        shares = _triton().gradients(current, gradient, dx, v, theta, level, leak, amplitude, channels, inner, rule)
        # `[4, N]` to `[4, K]`: N counts channels, and `inner` neighbours of each.
        totals = shares.double().view(4, -1, channels, inner).sum((1, 3)).float()
        return _wanted(dx, totals, parameters, channels)
    length = _loops().block_length(channels, inner)
    groups = _groups(gradient.numel() // rule.steps, length)
    sums = np.zeros((groups, 4, channels), np.float32)
    surrogate = rule.surrogate
    _share_out(
        _loops().backward,
        groups,
        _bits(current, 1 if rule.constant else rule.steps),
        _bits(gradient, rule.steps),
        _bits(dx, 1 if rule.constant else rule.steps),
        _flat(v),
        _flat(theta),
        _flat(_firing_level(theta, rule.strict)),
        _flat(leak),
        _flat(amplitude),
        sums,
        inner,
        length,
        rule.steps,
        rule.constant,
        current.dtype == torch.bfloat16,
        SHAPES[surrogate.shape],
        np.float32(1 / surrogate.width),
        np.float32(surrogate.scale),
        surrogate.unscaled,
    )
    return _wanted(dx, torch.from_numpy(sums.sum(0, dtype=np.float64).astype(np.float32)), parameters, channels)


def _wanted(dx: Tensor, totals: Tensor, parameters: tuple[Tensor, ...], channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the order of the arguments; `totals` `[4, K]` are those to theta, leak, amplitude and v0."""
    to_theta, to_leak, to_amplitude, to_v = (
        (total if parameter.numel() == channels else total.sum()).reshape(parameter.shape)
        for total, parameter in zip(totals, parameters, strict=True)
    )
    return dx, to_v, to_theta, to_leak, to_amplitude


def _like(x: Tensor, other: Tensor) -> Tensor:
    """`x` laid out as `other`, whose rows may be fewer."""
    if other.is_contiguous():
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def fused(current: Tensor, v: Tensor, theta: Tensor, leak: Tensor, amplitude: Tensor, rule: Any) -> Tensor:
    """Outputs `[T*B, ...]`; arguments as of `neuron.integrate`, such that `applies` is true."""
    if torch.compiler.is_compiling():
        return cast(Tensor, fire_operator(current, v, theta, leak, amplitude, None, *_plain(rule)))
    return cast(Tensor, _Fused.apply(current, v, theta, leak, amplitude, rule))


def fired(current: Tensor, v: Tensor, theta: Tensor, leak: Tensor, amplitude: Tensor, rule: Any, dtype: torch.dtype) -> Tensor:
    """Outputs in the type `dtype`, see `fire`, without a gradient."""
    if torch.compiler.is_compiling():
        return cast(Tensor, fire_operator(current, v, theta, leak, amplitude, dtype, *_plain(rule)))
    return fire(current, v, theta, leak, amplitude, rule, dtype)


def staircase_applies(z: Tensor, ceiling: Tensor) -> bool:
    """True if `staircase` and its gradients can take this: on the CPU, as for `applies`."""
    return not torch.compiler.is_compiling() and z.device.type == "cpu" and _takes(z, (ceiling,))


def staircase(z: Tensor, ceiling: Tensor, levels: int, shift: float) -> Tensor:
    """Ceiling * clip(floor(z levels/ceiling + shift), 0, levels)/levels, like `z`."""
    inner, channels = _inner(z), ceiling.numel()
    length = _loops().block_length(channels, inner)
    out = torch.empty_like(z)
    _share_out(
        _loops().staircase,
        _groups(z.numel(), length),
        _bits(z, 1),
        _bits(out, 1),
        _flat(levels / ceiling),
        _flat(ceiling),
        channels,
        inner,
        length,
        np.float32(shift),
        np.float32(levels),
        z.dtype == torch.bfloat16,
    )
    return out


def staircase_gradients(
    gradient: Tensor, z: Tensor, ceiling: Tensor, levels: int, shift: float, bounds: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Gradients to `z`, and to the ceiling, which takes the floor as the identity where the other passes.

    It passes between the bounds, or without any as a triangle around each jump.
    """
    low, high = bounds or (ceiling, ceiling)
    inner, channels = _inner(z), ceiling.numel()
    length = _loops().block_length(channels, inner)
    groups = _groups(z.numel(), length)
    dz = torch.empty_like(z)
    sums = np.zeros((groups, 1, channels), np.float32)
    _share_out(
        _loops().staircase_backward,
        groups,
        _bits(z, 1),
        _bits(_like(gradient.to(z.dtype), z), 1),
        _bits(dz, 1),
        _flat(levels / ceiling),
        _flat(ceiling),
        _flat(low),
        _flat(high),
        sums,
        inner,
        length,
        np.float32(shift),
        np.float32(levels),
        bounds is None,
        z.dtype == torch.bfloat16,
    )
    to_ceiling = torch.from_numpy(sums.sum((0, 1), dtype=np.float64).astype(np.float32))
    return dz, to_ceiling.reshape(ceiling.shape)


# The same as an operator that torch.compile and torch.export see through. Called directly it costs some 50 microseconds
# more than the function, so it is used only there.


class _Surrogate(NamedTuple):
    shape: str
    width: float
    scale: float
    unscaled: bool


class _Plain(NamedTuple):
    steps: int
    constant: bool
    strict: bool
    surrogate: _Surrogate


Settings = tuple[int, bool, bool, str, float, float, bool]
_SETTINGS = "int steps, bool constant, bool strict, str shape, float width, float scale, bool unscaled"
_TENSORS = "Tensor current, Tensor v, Tensor theta, Tensor leak, Tensor amplitude"


def _plain(rule: Any) -> Settings:
    surrogate = rule.surrogate
    return rule.steps, rule.constant, rule.strict, surrogate.shape, surrogate.width, surrogate.scale, surrogate.unscaled


def _rule(settings: Sequence[Any]) -> _Plain:
    steps, constant, strict, *surrogate = settings
    return _Plain(steps, constant, strict, _Surrogate(*surrogate))


def _operator(
    current: Tensor, v: Tensor, theta: Tensor, leak: Tensor, amplitude: Tensor, dtype: torch.dtype | None, *settings: Any
) -> Tensor:
    return fire(current, v, theta, leak, amplitude, _rule(settings), dtype)


def _operator_backward(
    gradient: Tensor, current: Tensor, v: Tensor, theta: Tensor, leak: Tensor, amplitude: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, *rest = _gradients(gradient, current, v, theta, leak, amplitude, _rule(settings))
    to_v, to_theta, to_leak, to_amplitude = (value.clone() for value in rest)  # rows of one tensor otherwise
    return dx, to_v, to_theta, to_leak, to_amplitude


fire_operator: Any = torch.library.custom_op(
    "quickspike::fire", _operator, mutates_args=(), schema=f"({_TENSORS}, ScalarType? dtype, {_SETTINGS}) -> Tensor"
)
_backward_operator: Any = torch.library.custom_op(
    "quickspike::fire_backward",
    _operator_backward,
    mutates_args=(),
    schema=f"(Tensor gradient, {_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _fake(current: Tensor, v: Tensor, theta: Tensor, leak: Tensor, amplitude: Tensor, dtype: torch.dtype | None, *settings: Any) -> Tensor:
    return _empty_outputs(current, settings[0], settings[1], dtype)


def _fake_backward(gradient: Tensor, *tensors_and_settings: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in tensors_and_settings[:5])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[6:]


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    found = _backward_operator(gradient, *ctx.saved_tensors, *ctx.settings)
    return (*found, *(None,) * (1 + len(ctx.settings)))


fire_operator.register_fake(_fake)
_backward_operator.register_fake(_fake_backward)
fire_operator.register_autograd(_differentiate, setup_context=_keep)
