"""The spiking neuron: soft-reset (leaky) integrate-and-fire, as a pure step, a pure scan and a module that holds parameters.

The equations are those that the seed papers share (papers' notation):

    m(t) = leak * v(t-1) + current(t)        v(0) = initial * theta
    s(t) = 1 if m(t) >= theta else 0         (strict: m(t) > theta)
    v(t) = m(t) - theta * s(t)               reset by subtraction
    out(t) = amplitude * s(t)                amplitude in units of theta where `scaled`
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quickspike.errors import ConversionError

SurrogateShape = Literal["triangular", "boxcar", "arctan", "sigmoid"]

MAX_STEPS = 65536
"""More time steps than any network needs; a larger number is a mistake or a hostile file."""

SMALLEST_THRESHOLD = 1e-8
"""A threshold never acts below this: a learned one could otherwise turn negative, and a silent channel's is 0."""


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """What stands in for the derivative of the step function at u = m/theta - 1; the peak, at u = 0, is `scale`.

    triangular: scale * max(0, 1 - |u|/width); boxcar: scale where |u| < width;
    arctan: scale / (1 + (pi u/width)^2); sigmoid: 4 scale g(1 - g) with g = sigmoid(4 u/width).
    """

    shape: SurrogateShape = "triangular"
    width: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.shape not in ("triangular", "boxcar", "arctan", "sigmoid"):
            raise ConversionError(f"surrogate shape must be triangular, boxcar, arctan or sigmoid, got {self.shape!r}")
        if not (self.width > 0 and math.isfinite(self.width) and math.isfinite(self.scale)):
            raise ConversionError(f"surrogate width must be > 0 and finite, got width={self.width!r}, scale={self.scale!r}")

    def derivative(self, u: Tensor) -> Tensor:
        """The stand-in derivative at `u`, same shape as `u`."""
        x = u / self.width
        if self.shape == "triangular":
            return self.scale * (1 - x.abs()).clamp_min(0)
        if self.shape == "boxcar":
            return self.scale * (x.abs() < 1).to(u)
        if self.shape == "arctan":
            return self.scale / (1 + (math.pi * x).square())
        gate = torch.sigmoid(4 * x)
        return 4 * self.scale * gate * (1 - gate)


class _Fire(torch.autograd.Function):
    """1 where m >= theta (strict: m > theta); backward by the surrogate of u = m/theta - 1."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, theta: Tensor, strict: bool, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(m, theta)
        ctx.surrogate = surrogate
        # Compared directly: dividing by theta first would round, and move spikes that sit on the boundary.
        return (m > theta if strict else m >= theta).to(m)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        m, theta = ctx.saved_tensors
        du = gradients[0] * ctx.surrogate.derivative(m / theta - 1)
        d_theta = (-du * m / theta.square()).sum_to_size(theta.shape) if ctx.needs_input_grad[1] else None
        return du / theta, d_theta, None, None


class _Bounded(torch.autograd.Function):
    """clamp(x, low, high); the gradient passes where x is inside, or where a step against it leads back inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.bounds
        gradient = gradients[0]
        return gradient * (((x >= low) | (gradient < 0)) & ((x <= high) | (gradient > 0))), None, None


@dataclasses.dataclass(frozen=True)
class NeuronParameters:
    """What a method decides for one site. Each tensor is a scalar or broadcasts over one sample (`[C, 1, 1]`).

    Raises:
        ConversionError: a value is not finite, a leak lies outside [0, 1], or a threshold is negative.
    """

    threshold: Tensor
    """theta, in units of the membrane potential, >= 0."""
    initial: Tensor | float = 0.0
    """v(0) as a fraction of theta, so that it follows a threshold that is learned."""
    leak: Tensor | float = 1.0
    """Share of the potential that survives a step, in [0, 1]."""
    amplitude: Tensor | float = 1.0
    """Height of a spike, in units of theta if `scaled`, else absolute."""
    scaled: bool = True
    strict: bool = False
    """Fire at m > theta instead of m >= theta."""

    def __post_init__(self) -> None:
        for name in ("threshold", "initial", "leak", "amplitude"):
            value = torch.as_tensor(getattr(self, name), dtype=self.threshold.dtype, device=self.threshold.device)
            object.__setattr__(self, name, value.detach().clone())
            if not bool(torch.isfinite(value).all()):
                raise ConversionError(f"neuron {name} must be finite, got {value}")
        leak = torch.as_tensor(self.leak)
        if bool((self.threshold < 0).any()):
            raise ConversionError(f"neuron threshold must be >= 0, got {float(self.threshold.min()):g}")
        if bool(((leak < 0) | (leak > 1)).any()):
            raise ConversionError(f"neuron leak must lie in [0, 1], got {leak}")


def unfold(x: Tensor, steps: int) -> Tensor:
    """Split the time out of the batch axis: `[T*B, ...]` to `[T, B, ...]`."""
    return x.reshape(steps, -1, *x.shape[1:])


class Timed(nn.Module, abc.ABC):
    """A layer that knows time. Layers without state need not be one: time is folded into their batch axis.

    forward() takes all steps at once, `[T*B, ...]`; step() takes one, `[B, ...]`, and must give the same numbers.
    """

    steps: int

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Output and new state after one step; `state` is None at the first."""


class Neuron(Timed):
    """Integrate-and-fire neurons at one site.

    Args:
        parameters: thresholds, initial potentials, leaks and amplitudes.
        steps: T.
        constant_input: True if the input `[B, ...]` is the same current at every step; else it is `[T*B, ...]`.
        surrogate: the derivative used by autograd.
    """

    def __init__(self, parameters: NeuronParameters, steps: int, constant_input: bool, surrogate: Surrogate | None = None) -> None:
        super().__init__()
        self.steps, self.constant_input = steps, constant_input
        self.scaled, self.strict = parameters.scaled, parameters.strict
        self.surrogate = surrogate or Surrogate()
        for name in ("threshold", "initial", "leak", "amplitude"):
            self.register_parameter(name, nn.Parameter(getattr(parameters, name), requires_grad=False))

    threshold: nn.Parameter
    initial: nn.Parameter
    leak: nn.Parameter
    amplitude: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        current = x.expand(self.steps, *x.shape) if self.constant_input else unfold(x, self.steps)
        spikes, state = [], None
        for t in range(self.steps):
            out, state = self.step(current[t], state)
            spikes.append(out)
        return torch.stack(spikes).flatten(0, 1)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        smallest = max(SMALLEST_THRESHOLD, torch.finfo(self.threshold.dtype).tiny)
        theta = _Bounded.apply(self.threshold, smallest, math.inf)
        leak = _Bounded.apply(self.leak, 0.0, 1.0)
        v = self.initial * theta if state is None else state
        spike, v = integrate_and_fire(x, v, theta, leak, self.strict, self.surrogate)
        return spike * (self.amplitude * theta if self.scaled else self.amplitude), v

    def extra_repr(self) -> str:
        count = self.threshold.numel()
        theta = f"{float(self.threshold.mean()):.4g}" + (f" (mean of {count})" if count > 1 else "")
        return f"theta={theta}, v0={float(self.initial.mean()):g} theta, leak={float(self.leak.mean()):g}, steps={self.steps}"


def integrate_and_fire(
    current: Tensor, v: Tensor, theta: Tensor, leak: Tensor, strict: bool, surrogate: Surrogate
) -> tuple[Tensor, Tensor]:
    """One step of soft-reset integrate-and-fire: (spikes in {0, 1}, new membrane potential).

    Args:
        current: input of this step, `[B, ...]`.
        v: membrane potential after the step before, broadcastable to `current`.
        theta: threshold, scalar or per channel, broadcastable.
        leak: likewise, in [0, 1].
        strict: fire at m > theta instead of m >= theta.
        surrogate: derivative of the step function for autograd.
    """
    m = torch.addcmul(current, leak, v)
    spikes: Tensor = _Fire.apply(m, theta, strict, surrogate)
    return spikes, torch.addcmul(m, theta, spikes, value=-1)


class Repeat(Timed):
    """Where time starts for a signal that is the same at every step: `[B, ...]` to `[T*B, ...]`."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(self.steps, *x.shape).flatten(0, 1)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return x, state

    def extra_repr(self) -> str:
        return f"steps={self.steps}"


class AccumulatedMaxPool(Timed):
    """Max-pooling whose mean over time is the max-pooling of the mean.

    The pool looks at the sum of all inputs so far, S(t), and gives pool(S(t)) - pool(S(t-1)). The terms telescope, so
    the outputs of T steps sum to pool(S(T)). Pooling each step on its own would add up the winners of every step,
    which exceeds the pooled mean whenever inputs fluctuate: an error that no number of steps removes.
    """

    def __init__(self, pool: nn.Module, steps: int) -> None:
        super().__init__()
        self.pool, self.steps = pool, steps

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = [], None
        for current in unfold(x, self.steps):
            out, state = self.step(current, state)
            outputs.append(out)
        return torch.stack(outputs).flatten(0, 1)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if state is None:
            pooled = self.pool(x)
            return pooled, (x, pooled)
        total = state[0] + x
        pooled = self.pool(total)
        return pooled - state[1], (total, pooled)
