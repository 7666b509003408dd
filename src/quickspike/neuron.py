"""The spiking neuron: soft-reset (leaky) integrate-and-fire, as a pure step, a pure scan and a module that holds parameters.

The equations are those that the seed papers share (papers' notation):

    m(t) = leak * v(t-1) + current(t)        v(0) = initial * theta
    s(t) = 1 if m(t) >= theta else 0         (strict: m(t) > theta)
    v(t) = m(t) - theta * s(t)               reset by subtraction
    out(t) = amplitude * s(t)                amplitude in units of theta where `scaled`

A signed neuron also takes spikes back, as in SpikeZIP-TF (You et al., ICML 2024), which removes much of the error that comes
from the order of arrival: s(t) = -1 if m(t) < 0 and it has fired more often than it has taken back.

Weighted spikes say which of 2^T levels a mean current reaches, the largest part first: the spike of step t counts w(t) =
2^(T-t)/(2^T - 1), as in radix encoding (Z. Wang et al. 2021, arXiv 2105.06943). With the mean current z of the window before:

    m(1) = z + v(0)/(2^T - 1)                s(t) = 1 if m(t) >= w(t) theta else 0
    m(t+1) = m(t) - w(t) theta s(t)          out(t) = T w(t) amplitude s(t)

so that their mean over the T steps is that of 2^T - 1 steps of spikes without weights.

A group of M neurons (L. Lv et al. 2024, arXiv 2402.19061) stands where one neuron stood. Its members share their current, have the
thresholds theta/M, 2 theta/M .. theta, and every spike of one takes theta/M from the potentials of all, which are the same that way:

    m(t) = leak * v(t-1) + current(t)        v(0) = initial * theta/M
    s(t) = number of i in 1..M with m(t) >= i theta/M
    v(t) = m(t) - theta/M * s(t)             out(t) = amplitude/M * s(t)

so that one step tells M + 1 levels apart, with plain spikes and nobody waiting, for M times the neurons.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from quickspike import kernels
from quickspike.errors import ConversionError

SurrogateShape = Literal["triangular", "boxcar", "arctan", "sigmoid"]

MAX_STEPS = 65536
"""More time steps than any network needs; a larger number is a mistake or a hostile file."""

MOST_MEMBERS = 256
"""Largest group: with more levels than 8 bits tell apart there is nothing left to gain."""

MOST_WEIGHTED = 12
"""Largest T of weighted spikes: with 4095 levels there is nothing left to gain."""

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
    unscaled: bool = False
    """The gradients that the code of arXiv 2112.12133 takes: the height of a spike is left out of dL/dm, and every
    element, silent or not, hands its gradient to the threshold."""

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


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What of a neuron is no tensor."""

    steps: int
    constant: bool
    strict: bool
    surrogate: Surrogate
    to_zero: bool = False
    """A spike sets the potential to 0 instead of taking theta from it."""
    members: int = 1
    """Neurons in a group."""

    def fire(self, m: Tensor, theta: Tensor) -> Tensor:
        # Compared directly: a product with 1/theta would move spikes that sit on the boundary.
        return m > theta if self.strict else m >= theta

    def reset(self, m: Tensor, theta: Tensor) -> Tensor:
        """The potential after the spikes that `m` fires."""
        fired = self.fire(m, theta)
        return m.masked_fill(fired, 0.0) if self.to_zero else torch.addcmul(m, theta, fired.to(m.dtype), value=-1)


class _Scan(torch.autograd.Function):
    """All steps of integrate-and-fire at once, with its backward pass written out.

    Only the currents are kept for backward; potentials are computed again. The reset takes spikes as given: no gradient
    flows through its indicator, as in the papers that fine-tune. With e = dL/ds(t) h'(u(t)), u = m/theta - 1:

        dL/dm(t) = leak dL/dm(t+1) + e/theta        dL/dleak = sum_t dL/dm(t) v(t-1)
        dL/dtheta = - sum_t e m(t)/theta^2 - sum_t s(t) dL/dv(t),    dL/dv(t) = leak dL/dm(t+1)

    Where a spike sets the potential to 0, dL/dv(t) ends at s(t) = 1, and theta has no part in v(t).
    """

    @staticmethod
    def forward(ctx: Any, current: Tensor, v: Tensor, theta: Tensor, leak: Tensor, amplitude: Tensor, rule: _Rule) -> tuple[Tensor, Tensor]:
        """(outputs `[T*B, ...]`, final potential `[B, ...]`) from currents `[T*B, ...]`, or `[B, ...]` if constant."""
        ctx.save_for_backward(current, v, theta, leak, amplitude)
        ctx.rule = rule
        batch = current.shape[0] if rule.constant else current.shape[0] // rule.steps
        shape = (rule.steps * batch, *current.shape[1:])
        out = torch.empty(shape, dtype=current.dtype, device=current.device, memory_format=_format(current))
        slots = out.view(rule.steps, batch, *current.shape[1:])
        m = v
        for slot, m in zip(slots, potentials(current, v, theta, leak, rule), strict=True):
            # Not as a product, which has a sign where the height is negative and nothing fires: -0.0 is another number of bytes.
            slot.copy_(torch.where(rule.fire(m, theta), amplitude, 0.0))
        return out, rule.reset(m, theta)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        current, before, theta, leak, amplitude = ctx.saved_tensors
        rule: _Rule = ctx.rule
        reached = list(potentials(current, before, theta, leak, rule))
        g = unfold(gradients[0], rule.steps)
        need_current, need_v, need_theta, need_leak, need_amplitude, _ = ctx.needs_input_grad
        to_theta, to_leak, to_amplitude = (torch.zeros_like(parameter) for parameter in (theta, leak, amplitude))
        dv = gradients[1]
        parts: list[Tensor] = []
        for t in reversed(range(rule.steps)):
            m, gt = reached[t], g[t].to(dv.dtype)
            s = rule.fire(m, theta).to(dv.dtype)
            e = (gt if rule.surrogate.unscaled else gt * amplitude) * rule.surrogate.derivative(m / theta - 1) / theta
            dm = dv * (1 - s) + e if rule.to_zero else dv + e
            if need_theta:
                to_theta -= reduced(e * m / theta if rule.to_zero else torch.addcmul(e * m / theta, s, dv), theta)
            if need_amplitude:
                to_amplitude += reduced(gt if rule.surrogate.unscaled else gt * s, amplitude)
            if need_leak:
                earlier = reached[t - 1]
                v = before if t == 0 else rule.reset(earlier, theta)
                to_leak += reduced(dm * v, leak)
            parts.append(dm)
            dv = leak * dm
        to_current = None
        if need_current:
            to_current = (torch.stack(parts).sum(0) if rule.constant else torch.cat(parts[::-1])).to(current.dtype)
        return (
            to_current,
            reduced(dv, before) if need_v else None,
            to_theta if need_theta else None,
            to_leak if need_leak else None,
            to_amplitude if need_amplitude else None,
            None,
        )


def potentials(current: Tensor, v: Tensor, theta: Tensor, leak: Tensor, rule: _Rule) -> Iterator[Tensor]:
    """m(t), the potential before the reset, for t = 1..T."""
    inputs = current.expand(rule.steps, *current.shape) if rule.constant else unfold(current, rule.steps)
    # Half-precision currents of autocast are integrated in the precision of the thresholds.
    dtype = torch.promote_types(current.dtype, theta.dtype)
    for x in inputs:
        # Two roundings, as everywhere: addcmul has one on some machines, which moves spikes.
        m = x.to(dtype) + leak * v.to(dtype)
        yield m
        v = rule.reset(m, theta)


class _Step(torch.autograd.Function):
    """`fired` as numbers; backward, the surrogate's derivative at `u`."""

    @staticmethod
    def forward(ctx: Any, fired: Tensor, u: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(u)
        ctx.surrogate = surrogate
        return fired.to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (u,) = ctx.saved_tensors
        return None, gradients[0] * ctx.surrogate.derivative(u), None


def _signed_scan(
    current: Tensor, v: Tensor, left: Tensor | None, theta: Tensor, leak: Tensor, amplitude: Tensor, rule: _Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs `[T*B, ...]`, final potential `[B, ...]`, spikes that can be taken back `[B, ...]`) of signed neurons."""
    inputs = current.expand(rule.steps, *current.shape) if rule.constant else unfold(current, rule.steps)
    dtype = torch.promote_types(current.dtype, theta.dtype)
    # In half precision a count would end at 256.
    left = torch.zeros_like(inputs[0], dtype=torch.promote_types(dtype, torch.float32)) if left is None else left
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (current, v, theta, leak, amplitude))
    shape = (rule.steps * inputs.shape[1], *inputs.shape[2:])
    out = torch.empty(shape, dtype=current.dtype, device=current.device, memory_format=_format(current))
    outputs: list[Tensor] = []
    for x, slot in zip(inputs, out.view(rule.steps, *inputs.shape[1:]), strict=True):
        m = x.to(dtype) + leak * v.to(dtype)
        up = _Step.apply(rule.fire(m, theta), m / theta - 1, rule.surrogate)
        down = _Step.apply(m < 0, -m / theta, rule.surrogate) * (left > 0)
        spikes = up - down
        # -0.0, of no spike times a negative height, becomes 0.0.
        heights = spikes * amplitude + 0.0
        if learning:
            outputs.append(heights.to(current.dtype))
        else:
            slot.copy_(heights)
        # No gradient flows through the indicators of the reset.
        v = torch.addcmul(m, theta, spikes.detach(), value=-1)
        left = left + spikes.detach()
    return torch.cat(outputs) if learning else out, v, left


class _Members(torch.autograd.Function):
    """Spikes of the members of groups; backward, the sum of their surrogates' derivatives at m/unit - i, i = 1..M."""

    @staticmethod
    def forward(ctx: Any, spikes: Tensor, u: Tensor, rule: _Rule) -> Tensor:
        ctx.save_for_backward(u)
        ctx.rule = rule
        return spikes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (u,) = ctx.saved_tensors
        members, surrogate = ctx.rule.members, ctx.rule.surrogate
        if surrogate.shape == "triangular" and surrogate.width == 1:
            # These triangles add up to a plateau from the first jump to the last.
            slope = torch.minimum(u, members + 1 - u).clamp_(0, 1).mul_(surrogate.scale)
        else:
            slope = torch.zeros_like(u)
            for member in range(1, members + 1):
                slope += surrogate.derivative(u - member)
        return None, gradients[0] * slope, None


def _fired_members(m: Tensor, unit: Tensor, rule: _Rule) -> Tensor:
    """How many of the thresholds unit, 2 unit .. M unit the potentials `m` reach."""
    spikes = (m / unit).floor_().clamp_(0, rule.members).nan_to_num_(0.0)
    # A quotient may be rounded over a threshold: what counts is the comparison, one level up and one level down.
    spikes += (rule.fire(m, unit * (spikes + 1)) & (spikes < rule.members)).to(spikes)
    return spikes - (~rule.fire(m, unit * spikes) & (spikes > 0)).to(spikes)


def _grouped_scan(current: Tensor, v: Tensor, theta: Tensor, leak: Tensor, amplitude: Tensor, rule: _Rule) -> tuple[Tensor, Tensor]:
    """(outputs `[T*B, ...]`, final potential `[B, ...]`) of groups of neurons."""
    inputs = current.expand(rule.steps, *current.shape) if rule.constant else unfold(current, rule.steps)
    dtype = torch.promote_types(current.dtype, theta.dtype)
    unit, height = theta / rule.members, amplitude / rule.members
    outputs: list[Tensor] = []
    for x in inputs:
        m = x.to(dtype) + leak * v.to(dtype)
        spikes = _fired_members(m.detach(), unit.detach(), rule)
        outputs.append((cast(Tensor, _Members.apply(spikes, m / unit, rule)) * height + 0.0).to(current.dtype))
        # No gradient flows through the indicators of the reset.
        v = torch.addcmul(m, unit, spikes, value=-1)
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0], v


class _Weighted(torch.autograd.Function):
    """Weighted spikes `[T*B, ...]` for the mean current `[B, ...]`, the same at every step.

    Backward as if the staircase were a slope, amplitude/theta under currents from 0 to theta. With g = sum_t dL/dout(t) and
    q the mean output over the amplitude:

        dL/dz = g amplitude/theta inside        dL/dtheta = - dL/dz z/theta
        dL/dv(0) = dL/dz/(2^T - 1)              dL/damplitude = g q
    """

    @staticmethod
    def forward(ctx: Any, current: Tensor, v: Tensor, theta: Tensor, amplitude: Tensor, rule: _Rule) -> Tensor:
        ctx.save_for_backward(current, v, theta, amplitude)
        ctx.rule = rule
        shape = (rule.steps * current.shape[0], *current.shape[1:])
        out = torch.empty(shape, dtype=current.dtype, device=current.device, memory_format=_format(current))
        slots = out.view(rule.steps, *current.shape)
        for slot, (weight, fired) in zip(slots, _digits(current, v, theta, rule), strict=True):
            slot.copy_(torch.where(fired, amplitude * (rule.steps * weight), 0.0))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        current, v, theta, amplitude = ctx.saved_tensors
        rule: _Rule = ctx.rule
        g = unfold(gradients[0], rule.steps).to(theta.dtype).sum(0)
        z = current.to(theta.dtype)
        need_current, need_v, need_theta, need_amplitude, _ = ctx.needs_input_grad
        to_z = g * ((z >= 0) & (z <= theta)) * (amplitude / theta)
        share = sum(weight * fired.to(theta.dtype) for weight, fired in _digits(current, v, theta, rule)) if need_amplitude else None
        return (
            to_z.to(current.dtype) if need_current else None,
            reduced(to_z / levels_of(rule.steps), v) if need_v else None,
            reduced(-to_z * z / theta, theta) if need_theta else None,
            reduced(g * share, amplitude) if share is not None else None,
            None,
        )


def levels_of(steps: int, weighted: bool = True, members: int = 1) -> int:
    """Levels above 0 that spikes, of groups of so many neurons, tell apart in so many steps."""
    return int(2**steps - 1) if weighted else steps * members


def _digits(current: Tensor, v: Tensor, theta: Tensor, rule: _Rule) -> Iterator[tuple[float, Tensor]]:
    """w(t) and which neurons fire, for t = 1..T."""
    unit = theta / levels_of(rule.steps)
    m = current.to(torch.promote_types(current.dtype, theta.dtype)) + v / levels_of(rule.steps)
    for place in reversed(range(rule.steps)):
        # Powers of two, so that thresholds are exact multiples of a level and differences of like numbers are, too.
        threshold = unit * 2.0**place
        fired = rule.fire(m, threshold)
        yield 2.0**place / levels_of(rule.steps), fired
        m = torch.addcmul(m, threshold, fired.to(m.dtype), value=-1)


def weighted_spikes(current: Tensor, v: Tensor, theta: Tensor, amplitude: Tensor, steps: int, *, strict: bool = False) -> Tensor:
    """Weighted spikes `[T*B, ...]` for the mean current `[B, ...]`, see the top of this file.

    Args:
        current: the same at every step.
        v: v(0), in units of the potential that `theta` is in; a level is theta/(2^T - 1), and that share of v is added.
        theta: threshold, scalar or per channel, broadcastable.
        amplitude: mean output of neurons that fire at every step, likewise.
        steps: T.
        strict: fire above the thresholds instead of at them.
    """
    return cast(Tensor, _Weighted.apply(current, v, theta, amplitude, _Rule(steps, True, strict, Surrogate())))


def _format(x: Tensor) -> torch.memory_format:
    """How the outputs of a current are laid out."""
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def reduced(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient summed, in at least single precision, to the shape of the parameter that was broadcast."""
    return gradient.float().sum_to_size(like.shape).to(like.dtype) if like.dtype != torch.float64 else gradient.sum_to_size(like.shape)


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


def keep_positive(value: Tensor) -> Tensor:
    """A learned threshold or ceiling as it acts: at least `SMALLEST_THRESHOLD`, with a gradient that leads back."""
    smallest = max(SMALLEST_THRESHOLD, torch.finfo(value.dtype).tiny)
    return cast(Tensor, _Bounded.apply(value, smallest, math.inf))


class _Sloped(torch.autograd.Function):
    """The mean output under a constant current; backward, see `Neuron.mean_output`."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, neuron: Neuron) -> Tensor:
        theta, _ = neuron.bounded()
        ctx.save_for_backward(current, theta, neuron.height(theta))
        return neuron.mean_output(current)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        current, theta, height = ctx.saved_tensors
        inside = (current >= 0) & (current <= theta)
        return gradients[0] * inside * (height / theta), None


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
    averaged: bool = False
    """Wait for all T steps of the layer before and integrate their mean current (synchronous) instead of streaming."""
    signed: bool = False
    """Take a spike back, as a spike of height -amplitude, where the potential is negative and one is left to take."""
    to_zero: bool = False
    """A spike sets the potential to 0, instead of taking theta from it: what is above theta is lost."""
    weighted: bool = False
    """The spike of step t counts 2^(T-t) times as much as that of step T; for neurons that wait, or whose current is constant."""
    members: int = 1
    """Neurons in the group that stands in place of one, each with a part of its height."""

    def __post_init__(self) -> None:
        for name in ("threshold", "initial", "leak", "amplitude"):
            value = torch.as_tensor(getattr(self, name), dtype=self.threshold.dtype, device=self.threshold.device)
            object.__setattr__(self, name, value.detach().clone())
            if not bool(torch.isfinite(value).all()):
                raise ConversionError(f"neuron {name} must be finite, got {value}")
        if self.signed and self.to_zero:
            raise ConversionError("spikes that are taken back need a reset by subtraction")
        leak = torch.as_tensor(self.leak)
        if self.weighted and (self.signed or self.to_zero or bool((leak != 1).any())):
            raise ConversionError("weighted spikes need a reset by subtraction, no signs and no leak")
        if type(self.members) is not int or not 1 <= self.members <= MOST_MEMBERS:
            raise ConversionError(f"a group has 1 to {MOST_MEMBERS} neurons, got {self.members!r}"[:300])
        if self.members > 1 and (self.signed or self.to_zero or self.weighted):
            raise ConversionError("groups of neurons need a reset by subtraction, no signs and no weights of spikes")
        if bool((self.threshold < 0).any()):
            raise ConversionError(f"neuron threshold must be >= 0, got {float(self.threshold.min()):g}")
        if bool(((leak < 0) | (leak > 1)).any()):
            raise ConversionError(f"neuron leak must lie in [0, 1], got {leak}")


def unfold(x: Tensor, steps: int) -> Tensor:
    """Split the time out of the batch axis: `[T*B, ...]` to `[T, B, ...]`."""
    return x.reshape(steps, -1, *x.shape[1:])


class Timed(nn.Module, abc.ABC):
    """A layer that knows time. Layers without state need not be one: time is folded into their batch axis.

    forward() takes all steps at once, `[T*B, ...]`; scan() takes some, and goes on from a state.
    """

    steps: int

    @abc.abstractmethod
    def scan(self, x: Tensor, state: Any, steps: int) -> tuple[Tensor, Any]:
        """Outputs `[steps*B, ...]` of the next steps, and the new state; `state` is None at the beginning."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scan(x, None, self.steps)[0]


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
        self.scaled, self.strict, self.averaged = parameters.scaled, parameters.strict, parameters.averaged
        self.signed, self.to_zero, self.weighted = parameters.signed, parameters.to_zero, parameters.weighted
        self.members = parameters.members
        if self.weighted and not (constant_input or parameters.averaged):
            raise ConversionError("weighted spikes say what a whole window amounts to; neurons that stream have none (averaged=True)")
        if self.weighted and steps > MOST_WEIGHTED:
            raise ConversionError(f"weighted spikes have at most {MOST_WEIGHTED} steps, got {steps}")
        self.surrogate = surrogate or Surrogate()
        self.dropout = 0.0
        """Share of the neurons that are silenced in training mode, the same ones at every step of a batch."""
        self.compiled = True
        """Run as compiled loops where these apply; False: always as the reference, in torch."""
        self.output: torch.dtype | None = None
        """Type of the outputs, for inference: None as the currents; torch.uint8 gives 0 and 1, whatever the height."""
        for name in ("threshold", "initial", "leak", "amplitude"):
            self.register_parameter(name, nn.Parameter(getattr(parameters, name), requires_grad=False))

        self.counts = False
        """Take the sum of the currents over all steps `[B, ...]`, and give the numbers of spikes `[B, ...]`, as bytes."""

    threshold: nn.Parameter
    initial: nn.Parameter
    leak: nn.Parameter
    amplitude: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:
            return self._counted(x)
        if self.signed or self.members > 1:
            return self.scan(x, None, self.steps)[0]
        # The final potential is of no use here, and the compiled loops do not give it.
        x, constant = self._currents(x, self.steps)
        theta, leak = self.bounded()
        initial, amplitude = self.initial * theta, self.height(theta)
        rule = self.rule(self.steps, constant)
        if self.weighted:
            return self._given(self._dropped(_Weighted.apply(x, initial, theta, amplitude, rule), None, self.steps)[0])
        # The compiled loops know reset by subtraction only.
        parameters = (initial, theta, leak, amplitude)
        compiled = self.compiled and not self.to_zero and kernels.applies(x, parameters, self.steps, self.surrogate.shape)
        if compiled and self.output is not None:
            return kernels.fired(x, initial, theta, leak, amplitude, rule, self.output)
        if compiled:
            out = kernels.fused(x, initial, theta, leak, amplitude, rule)
        else:
            out, _ = _Scan.apply(x, initial, theta, leak, amplitude, rule)
        return self._given(self._dropped(out, None, self.steps)[0])

    def _counted(self, x: Tensor) -> Tensor:
        return self._spikes_under(x, 1 if self.constant_input else self.resolution, torch.uint8)

    def mean_output(self, current: Tensor) -> Tensor:
        """The mean output over T steps, `[B, ...]`, under a current `[B, ...]` that is the same at every step.

        Of signed neurons that start above theta, too: they may take spikes back. The gradient is that of a staircase whose
        steps are taken as a slope: height/theta under currents from 0 to theta, 0 elsewhere, and to the current alone.
        """
        if torch.is_grad_enabled() and current.requires_grad:
            return cast(Tensor, _Sloped.apply(current, self))
        theta, leak = self.bounded()
        if self.signed and bool((self.initial > 1).any()):
            rule = self.rule(self.steps, True)
            out, _, _ = _signed_scan(current, self.initial * theta, None, theta, leak, self.height(theta), rule)
            return unfold(out, self.steps).mean(0)
        if self.weighted:
            # Added up as whole numbers, as spikes without weights are: shares of 2^T - 1 are no numbers of a binary computer.
            digits = _digits(current, self.initial * theta, theta, self.rule(self.steps, True))
            level = sum(fired.to(theta.dtype) * 2.0**place for place, (_, fired) in zip(reversed(range(self.steps)), digits, strict=True))
            return (level * (self.height(theta) / self.resolution)).to(current.dtype)
        if self.members > 1:
            rule = self.rule(self.steps, True)
            out, _ = _grouped_scan(current, self.start(theta), theta, leak, self.height(theta), rule)
            return unfold(out, self.steps).mean(0)
        return self._spikes_under(current, 1, torch.int32).to(current.dtype) * (self.height(theta) / self.steps)

    def _spikes_under(self, x: Tensor, divisor: int, kind: torch.dtype) -> Tensor:
        """Spikes in T steps under the constant current x/divisor; levels of weighted ones and of groups."""
        theta, leak = self.bounded()
        v = self.initial * theta
        # A group of M goes through M levels where one neuron goes through M steps.
        rule = dataclasses.replace(self.rule(self.resolution, True), members=1)
        if self.compiled and not self.to_zero and kernels.applies(x, (v, theta, leak), rule.steps, self.surrogate.shape):
            return kernels.count(x, v, theta, leak, rule, divisor, kind)
        # A quotient in half precision would be rounded once more than in the compiled loops.
        current = x.to(torch.promote_types(x.dtype, theta.dtype)) / divisor
        out, _ = _Scan.apply(current, v, theta, leak, torch.ones_like(theta), rule)
        return unfold(out, rule.steps).ne(0).sum(0).to(kind)

    def scan(self, x: Tensor, state: Any, steps: int) -> tuple[Tensor, Any]:
        x, constant = self._currents(x, steps)
        theta, leak = self.bounded()
        v, mask, left = state or (None, None, None)
        initial, amplitude = self.start(theta), self.height(theta)
        rule = self.rule(steps, constant)
        learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, theta, leak, amplitude))
        # Fallen back from inside torch.compile: it takes the operator of forward(), but no loop that keeps its state.
        compiled = self.compiled and not learning and not self.to_zero and not torch.compiler.is_compiling()
        compiled = compiled and kernels.applies(x, (initial, theta, leak, amplitude), steps, self.surrogate.shape)
        if self.weighted:
            self._check_whole(steps)
            out, mask = self._dropped(self._given(_Weighted.apply(x, initial, theta, amplitude, rule)), mask, steps)
            return out, (None, mask, None)
        if self.signed:
            scan = kernels.fire_signed if compiled and x.device.type == "cpu" else _signed_scan
            out, v, left = scan(x, initial if v is None else v, left, theta, leak, amplitude, rule)
            out, mask = self._dropped(self._given(out), mask, steps)
            return out, (v, mask, left)
        if self.members > 1:
            out, v = _grouped_scan(x, initial if v is None else v, theta, leak, amplitude, rule)
            out, mask = self._dropped(self._given(out), mask, steps)
            return out, (v, mask, None)
        if compiled:
            out, v = kernels.fire_on(x, v, initial, theta, leak, amplitude, rule, self.output)
        else:
            out, v = _Scan.apply(x, initial if v is None else v, theta, leak, amplitude, rule)
            out = self._given(out)
        out, mask = self._dropped(out, mask, steps)
        return out, (v, mask, None)

    def _given(self, out: Tensor) -> Tensor:
        """Outputs in the type that is asked for."""
        if self.output is None:
            return out
        return out.ne(0).to(torch.uint8) if self.output == torch.uint8 else out.to(self.output)

    def _currents(self, x: Tensor, steps: int) -> tuple[Tensor, bool]:
        """The currents to integrate, and whether they are the same at every step."""
        if not self.averaged:
            return x, self.constant_input
        self._check_whole(steps)
        return (x if self.constant_input else unfold(x, steps).mean(0)), True

    def rule(self, steps: int, constant: bool) -> _Rule:
        """What of these neurons is no tensor, for some steps; `constant` if currents are the same at all of them."""
        return _Rule(steps, constant, self.strict, self.surrogate, self.to_zero, self.members)

    @property
    def waits(self) -> bool:
        """True if T cannot be cut short: all steps have to be there before the first output, or weigh by how many they are."""
        return self.averaged or self.weighted

    @property
    def resolution(self) -> int:
        """Levels above 0 that T steps tell apart."""
        return levels_of(self.steps, self.weighted, self.members)

    def start(self, theta: Tensor) -> Tensor:
        """v(0)."""
        return self.initial * theta / self.members if self.members > 1 else self.initial * theta

    def spikes(self, out: Tensor) -> Tensor:
        """Numbers of spikes in outputs of these neurons, same shape: 0 and 1, of groups up to M; spikes of -1 count as one, too.

        Outputs in bfloat16 tell up to 128 spikes apart.
        """
        if self.members == 1:
            return out.ne(0)
        height = self.height(self.bounded()[0])
        return torch.where(height == 0, 0.0, out / (height / self.members)).round()

    @property
    def first_run(self) -> tuple[str, int] | None:
        """What a first run over some steps is for, and how many; None without one (see `rehearsal.py`)."""
        return None

    @property
    def delay(self) -> int:
        """Steps that the outputs come after the currents. A window of one step is over at once."""
        return self.steps if self.averaged and not self.constant_input and self.steps > 1 else 0

    def height(self, theta: Tensor) -> Tensor:
        """Height of a spike."""
        amplitude = self.amplitude * theta if self.scaled else self.amplitude
        if self.surrogate.unscaled and self.scaled:
            # The published code's gradient to the threshold lacks the amplitude.
            return amplitude.detach() + (theta - theta.detach())
        return amplitude

    def _dropped(self, out: Tensor, mask: Tensor | None, steps: int) -> tuple[Tensor, Tensor | None]:
        """Outputs with some neurons silenced, and which: the same ones at every step."""
        if not (self.training and self.dropout):
            return out, mask
        spikes = unfold(out, steps)
        if mask is None:
            mask = (torch.rand_like(spikes[0], dtype=torch.float32) >= self.dropout).to(out) / (1 - self.dropout)
        return (spikes * mask).flatten(0, 1), mask

    def bounded(self) -> tuple[Tensor, Tensor]:
        """Threshold and leak as they act: positive, and within [0, 1]."""
        return keep_positive(self.threshold), _Bounded.apply(self.leak, 0.0, 1.0)

    def _check_whole(self, steps: int) -> None:
        if steps != self.steps:
            raise ConversionError(
                f"neurons that wait for all {self.steps} steps of the layer before, or whose spikes are weighted, cannot run {steps} at a "
                "time. Way out: simulate without step_by_step, tune with chunk=0, or convert without synchronous, weighted and offset_shift"
            )

    def extra_repr(self) -> str:
        count = self.threshold.numel()
        theta, initial, leak = (float(value.detach().mean()) for value in (self.threshold, self.initial, self.leak))
        several = f" (mean of {count})" if count > 1 else ""
        kind = "".join(f", {flag}" for flag in ("averaged", "signed", "to_zero", "weighted") if getattr(self, flag))
        kind += f", members={self.members}" if self.members > 1 else ""
        return f"theta={theta:.4g}{several}, v0={initial:g} theta, leak={leak:g}, steps={self.steps}{kind}"


def integrate(
    current: Tensor,
    v: Tensor,
    theta: Tensor,
    leak: Tensor,
    amplitude: Tensor,
    steps: int,
    *,
    constant: bool = False,
    strict: bool = False,
    signed: bool = False,
    to_zero: bool = False,
    members: int = 1,
    surrogate: Surrogate | None = None,
) -> tuple[Tensor, Tensor]:
    """Integrate-and-fire over all steps: (outputs `[T*B, ...]`, final membrane potential `[B, ...]`).

    Args:
        current: `[T*B, ...]`, time first; `[B, ...]` where it is the same at every step.
        v: membrane potential before the first step, broadcastable to one step of `current`.
        theta: threshold, scalar or per channel, broadcastable.
        leak: likewise, in [0, 1].
        amplitude: height of a spike, likewise.
        steps: T.
        constant: `current` is one step's.
        strict: fire at m > theta instead of m >= theta.
        signed: take spikes back, see `NeuronParameters`.
        to_zero: a spike sets the potential to 0, see `NeuronParameters`.
        members: neurons in a group; `theta` and `amplitude` are those of the whole group.
        surrogate: derivative of the step function for autograd; triangular by default.
    """
    rule = _Rule(steps, constant, strict, surrogate or Surrogate(), to_zero, members)
    if members > 1:
        return _grouped_scan(current, v, theta, leak, amplitude, rule)
    if signed:
        return _signed_scan(current, v, None, theta, leak, amplitude, rule)[:2]
    return cast(tuple[Tensor, Tensor], _Scan.apply(current, v, theta, leak, amplitude, rule))


class Repeat(Timed):
    """Where time starts for a signal that is the same at every step: `[B, ...]` to `[T*B, ...]`."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.output: torch.dtype | None = None
        """Type of the outputs, for inference; None as the input."""

    def scan(self, x: Tensor, state: Any, steps: int) -> tuple[Tensor, Any]:
        x = x.to(self.output or x.dtype)
        return x.expand(steps, *x.shape).flatten(0, 1), state

    def extra_repr(self) -> str:
        return f"steps={self.steps}"


def single(x: Tensor) -> Tensor:
    """In single precision at least: a count of steps has no place in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RunningMean(Timed):
    """The mean of all inputs so far, `[T*B, ...]`: where a signal enters operators that are not affine.

    Such an operator f looks at the mean m(t) of its input up to t; `Increment`, behind it, passes on
    t f(m(t)) - (t-1) f(m(t-1)). The terms telescope: the outputs of T steps have the mean f(m(T)), without an error of
    their own, whatever f is.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def scan(self, x: Tensor, state: Any, steps: int) -> tuple[Tensor, Any]:
        done, total = state or (0, 0.0)
        sums = unfold(single(x), steps).cumsum(0) + total
        counts = torch.arange(done + 1, done + steps + 1, device=x.device, dtype=sums.dtype).view(-1, *(1,) * x.ndim)
        # A copy: a view would keep the sums of all steps.
        return (sums / counts).flatten(0, 1).to(x), (done + steps, sums[-1].clone())

    def extra_repr(self) -> str:
        return f"steps={self.steps}"


class Increment(Timed):
    """What makes the values `[T*B, ...]`, each for all steps so far, out of single steps; see `RunningMean`."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def scan(self, x: Tensor, state: Any, steps: int) -> tuple[Tensor, Any]:
        values = unfold(single(x), steps)
        done, last = state or (0, torch.zeros_like(values[0]))
        counts = torch.arange(done + 1, done + steps + 1, device=x.device, dtype=values.dtype).view(-1, *(1,) * x.ndim)
        sums = values * counts
        return torch.cat([sums[:1] - last, sums[1:] - sums[:-1]]).flatten(0, 1).to(x), (done + steps, sums[-1].clone())

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

    def scan(self, x: Tensor, state: Any, steps: int) -> tuple[Tensor, Any]:
        total, pooled = state or (0.0, 0.0)
        outputs = []
        # In half precision the sums would lose spikes.
        for current in unfold(single(x), steps):
            total = total + current
            now = self.pool(total)
            outputs.append(now - pooled)
            pooled = now
        return torch.cat(outputs).to(x), (total, pooled)
