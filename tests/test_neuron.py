"""The neuron against closed forms, a scalar loop and hand-written derivatives."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import oracles
from quickspike.errors import ConversionError
from quickspike.neuron import SMALLEST_THRESHOLD, AccumulatedMaxPool, Neuron, NeuronParameters, Repeat, Surrogate, integrate

F64 = torch.float64
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
STRICT = pytest.mark.parametrize("strict", [False, True])
SHAPES = pytest.mark.parametrize("shape", ["triangular", "boxcar", "arctan", "sigmoid"])


def tensor(value: object, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def make(theta: object = 1.0, steps: int = 4, constant: bool = False, surrogate: Surrogate | None = None, **more: object) -> Neuron:
    return Neuron(NeuronParameters(tensor(theta), **more), steps, constant, surrogate)


def train_of(neuron: Neuron, currents: list[float]) -> tuple[list[float], list[float]]:
    """Outputs and potentials of one neuron after each step."""
    outputs, potentials, state = [], [], None
    for current in currents:
        out, state = neuron.scan(tensor([current]), state, 1)
        outputs.append(out.item())
        potentials.append(state[0].item())
    return outputs, potentials


# C1


@DTYPES
@STRICT
@pytest.mark.parametrize("theta", [7, 10, 16])
def test_counts_equal_the_closed_form_at_every_step(theta: int, strict: bool, dtype: torch.dtype) -> None:
    z = torch.arange(-3 * theta, 3 * theta + 1)[:, None].expand(-1, theta)
    v0 = torch.arange(theta).expand_as(z)
    v, counts = v0.to(dtype), torch.zeros(z.shape, dtype=torch.int64)
    for t in range(1, 17):
        spikes, v = integrate(z.to(dtype), v, tensor(theta, dtype), tensor(1, dtype), tensor(1, dtype), 1, strict=strict)
        assert set(spikes.unique().tolist()) <= {0.0, 1.0}
        counts += spikes.long()
        expected = oracles.closed_form_count(z.numpy(), v0.numpy(), theta, t, strict)
        assert (counts.numpy() == expected).all(), f"t = {t}"


@DTYPES
@STRICT
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 16])
def test_the_module_gives_the_closed_form(steps: int, strict: bool, dtype: torch.dtype) -> None:
    theta = 16
    z = torch.arange(-3 * theta, 3 * theta + 1)[:, None].expand(-1, theta)
    v0 = torch.arange(theta)
    parameters = NeuronParameters(tensor(float(theta), dtype), initial=v0.to(dtype) / theta, strict=strict)
    for constant in (True, False):
        neuron = Neuron(parameters, steps, constant)
        current = z.to(dtype) if constant else z.to(dtype).repeat(steps, 1)
        out = neuron(current).unflatten(0, (steps, -1))
        assert out.dtype == dtype
        counts = (out / theta).cumsum(0)
        for t in range(1, steps + 1):
            assert (counts[t - 1].numpy() == oracles.closed_form_count(z.numpy(), v0.numpy(), theta, t, strict)).all()


def test_the_two_rules_differ_exactly_on_the_boundary() -> None:
    assert train_of(make(1.0, strict=False), [1.0])[0] == [1.0]
    assert train_of(make(1.0, strict=True), [1.0])[0] == [0.0]


# C2


@pytest.mark.parametrize("initial", [0.0, 0.5, 0.75])
def test_charge_is_conserved(initial: float) -> None:
    generator = torch.Generator().manual_seed(0)
    steps, batch = 24, 5
    weight, bias = torch.randn(11, 8, generator=generator, dtype=F64), torch.randn(11, generator=generator, dtype=F64) * 0.2
    spikes = (torch.rand(steps, batch, 8, generator=generator) < 0.4).double()
    theta = torch.rand(11, generator=generator, dtype=F64) + 0.5
    neuron = Neuron(NeuronParameters(theta, initial=initial), steps, False)
    total, state = torch.zeros(batch, 11, dtype=F64), None
    for t in range(steps):
        out, state = neuron.scan(spikes[t] @ weight.T + bias, state, 1)
        total += out
        phi = spikes[: t + 1].mean(0)
        expected = phi @ weight.T + bias - (state[0] - initial * theta) / (t + 1)
        assert (total / (t + 1) - expected).abs().max() < 1e-9
    folded = neuron((spikes @ weight.T + bias).flatten(0, 1)).unflatten(0, (steps, batch))
    assert torch.allclose(folded.sum(0), total, atol=1e-9)
    assert 0.05 < folded.ne(0).double().mean() < 0.95


# C3


@pytest.mark.parametrize(
    ("currents", "initial", "spikes", "last"),
    [
        ([1.5, 1.5, 0.0, 0.0], 0.0, [1, 1, 1, 0], 0.0),
        ([0.0, 0.0, 1.5, 1.5], 0.0, [0, 0, 1, 1], 1.0),
        ([2.0, 2.0, -2.0, -2.0], 0.5, [1, 1, 0, 0], -1.5),
        ([-1.0, -1.0, 1.5, 2.5], 0.5, [0, 0, 0, 1], 1.5),
    ],
)
def test_worked_examples(currents: list[float], initial: float, spikes: list[int], last: float) -> None:
    outputs, potentials = train_of(make(1.0, initial=initial), currents)
    assert outputs == spikes
    assert potentials[-1] == last
    assert make(1.0, initial=initial)(tensor(currents)[:, None]).flatten().tolist() == spikes


# Leak, amplitude, state


@STRICT
@pytest.mark.parametrize("leak", [0.0, 0.5, 0.75, 1.0])
def test_leak_and_reset_equal_the_scalar_loop(leak: float, strict: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    theta = [0.5, 1.0, 1.75]
    currents = torch.randint(-8, 17, (12, 3), generator=generator) / 8
    neuron = make(theta, steps=12, initial=0.5, leak=leak, strict=strict)
    out, state = [], None
    for current in currents.double():
        spikes, state = neuron.scan(current, state, 1)
        out.append(spikes)
    for unit in range(3):
        exact = [Fraction(value) for value in currents[:, unit].tolist()]
        spikes, potentials = oracles.neuron(exact, Fraction(theta[unit]), Fraction(theta[unit]) / 2, Fraction(leak), strict)
        assert [float(step[unit]) for step in out] == [theta[unit] * spike for spike in spikes]
        assert float(state[0][unit]) == float(potentials[-1])


def test_leak_may_differ_between_channels() -> None:
    neuron = make(1.0, steps=3, leak=tensor([1.0, 0.5, 0.0]), initial=0.0)
    current = tensor([0.5, 0.5, 0.5]).repeat(3, 1)
    assert neuron(current).sum(0).tolist() == [1.0, 0.0, 0.0]


def test_amplitude_is_in_units_of_theta_or_absolute() -> None:
    currents = tensor([[3.0, 0.5], [1.0, 2.0]])
    scaled = make([2.0, 0.5], steps=2, amplitude=1.5)(currents)
    absolute = make([2.0, 0.5], steps=2, amplitude=1.5, scaled=False)(currents)
    assert scaled.tolist() == [[3.0, 0.75], [3.0, 0.75]]
    assert absolute.tolist() == [[1.5, 1.5], [1.5, 1.5]]


def test_initial_potential_follows_a_changed_threshold() -> None:
    neuron = make(1.0, steps=1, initial=0.5, constant=True)
    with torch.no_grad():
        neuron.threshold.mul_(4)
    assert neuron(tensor([1.9, 2.0])).tolist() == [0.0, 4.0]


def test_calls_do_not_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(8 * 5, 3, generator=generator), torch.randn(8 * 2, 3, generator=generator)
    neuron = make([0.3, 0.7, 1.1], steps=8, initial=0.5).float()
    before = neuron(second)
    neuron(first)
    assert torch.equal(neuron(second), before)


# Surrogate gradients


@SHAPES
@pytest.mark.parametrize(("width", "scale"), [(1.0, 1.0), (0.5, 0.3), (2.0, 1.7)])
def test_surrogate_is_the_slope_of_its_smooth_step(shape: str, width: float, scale: float) -> None:
    surrogate = Surrogate(shape, width, scale)
    points = [-5.0, -1.9, -0.97, -0.48, -0.2, -0.01, 0.0, 0.13, 0.47, 0.98, 1.93, 4.0]
    got = surrogate.derivative(tensor(points)).tolist()
    for u, slope in zip(points, got, strict=True):
        assert slope == pytest.approx(oracles.slope_of_smooth_step(shape, width, scale, u), abs=1e-5), f"u = {u}"
    assert surrogate.derivative(tensor(0.0)).item() == pytest.approx(scale)


def test_surrogate_widths() -> None:
    def at(shape: str, u: float) -> float:
        return Surrogate(shape, 0.5, 2.0).derivative(tensor(u)).item()

    assert [at("triangular", u) for u in (-0.5, -0.25, 0.25, 0.5, 0.6)] == [0.0, 1.0, 1.0, 0.0, 0.0]
    assert [at("boxcar", u) for u in (-0.51, -0.49, 0.49, 0.51)] == [0.0, 2.0, 2.0, 0.0]
    assert at("arctan", 0.5 / math.pi) == pytest.approx(1.0)
    assert at("sigmoid", 0.5 * math.log(3 + 8**0.5) / 4) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "bad", [{"shape": "square"}, {"width": 0.0}, {"width": -1.0}, {"width": math.nan}, {"width": math.inf}, {"scale": math.nan}]
)
def test_surrogate_refuses(bad: dict[str, object]) -> None:
    with pytest.raises(ConversionError, match=next(iter(bad))):
        Surrogate(**bad)


@SHAPES
def test_gradients_equal_the_product_rule(shape: str) -> None:
    generator = torch.Generator().manual_seed(3)
    steps, theta, initial, leak, amplitude = 9, 0.8, 0.4, 0.9, 1.3
    surrogate = Surrogate(shape, 1.2, 0.7)
    neuron = make(theta, steps, initial=initial, leak=leak, amplitude=amplitude, surrogate=surrogate).requires_grad_(True)
    currents = (torch.randn(steps, 1, generator=generator, dtype=F64) * 0.6 + 0.3).requires_grad_(True)
    weights = torch.randn(steps, generator=generator, dtype=F64).tolist()
    out = neuron(currents)
    assert 0 < int(out.ne(0).sum()) < steps
    (out[:, 0] * tensor(weights)).sum().backward()

    def along(d_currents: list[float] | None = None, **directions: float) -> float:
        def slope(u: float) -> float:
            return surrogate.derivative(tensor(u)).item()

        arguments = (currents[:, 0].tolist(), theta, initial, leak, amplitude, slope)
        tangent = oracles.neuron_tangent(*arguments, d_currents or [0.0] * steps, **directions)
        return sum(weight * value for weight, value in zip(weights, tangent, strict=True))

    for t in range(steps):
        direction = [float(t == other) for other in range(steps)]
        assert currents.grad[t].item() == pytest.approx(along(direction), abs=1e-10)
    assert neuron.threshold.grad.item() == pytest.approx(along(d_theta=1.0), abs=1e-10)
    assert neuron.leak.grad.item() == pytest.approx(along(d_leak=1.0), abs=1e-10)
    assert neuron.initial.grad.item() == pytest.approx(along(d_initial=1.0), abs=1e-10)
    assert neuron.amplitude.grad.item() == pytest.approx(along(d_amplitude=1.0), abs=1e-10)


def test_gradient_of_a_shared_threshold_is_the_sum_over_its_neurons() -> None:
    generator = torch.Generator().manual_seed(4)
    currents = torch.randn(6 * 2, 3, 4, generator=generator, dtype=F64)
    shared = make([[0.5], [1.0], [1.5]], steps=6, initial=0.5).requires_grad_(True)
    single = make(shared.threshold.detach().expand(3, 4).tolist(), steps=6, initial=0.5).requires_grad_(True)
    for neuron in (shared, single):
        neuron(currents).square().sum().backward()
    assert shared.threshold.grad.shape == (3, 1)
    assert torch.allclose(shared.threshold.grad, single.threshold.grad.sum(1, keepdim=True), atol=1e-10)
    assert shared.threshold.grad.abs().min() > 0


def test_a_negative_threshold_acts_positive_and_can_climb_back() -> None:
    neuron = make(0.5, steps=2, constant=True).requires_grad_(True)
    with torch.no_grad():
        neuron.threshold.fill_(-0.5)
    out = neuron(tensor([1.0]))
    assert (out > 0).all()
    assert out[0].item() == pytest.approx(SMALLEST_THRESHOLD)
    (-out.sum()).backward()
    assert neuron.threshold.grad.item() == -2.0
    neuron.threshold.grad = None
    neuron(tensor([1.0])).sum().backward()
    assert neuron.threshold.grad.item() == 0.0


def test_a_threshold_inside_its_range_gets_gradients_of_both_signs() -> None:
    for sign in (1, -1):
        neuron = make(0.5, steps=2, constant=True).requires_grad_(True)
        (sign * neuron(tensor([0.6])).sum()).backward()
        assert neuron.threshold.grad.item() != 0


# Parameters


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["threshold", "initial", "leak", "amplitude"])
def test_parameters_must_be_finite(field: str, bad: float) -> None:
    with pytest.raises(ConversionError, match=field):
        NeuronParameters(**{"threshold": tensor([1.0, 1.0]), field: tensor([1.0, bad])})


@pytest.mark.parametrize(("field", "bad"), [("threshold", -0.1), ("leak", 1.001), ("leak", -0.001)])
def test_parameters_out_of_range(field: str, bad: float) -> None:
    with pytest.raises(ConversionError, match=field):
        NeuronParameters(**{"threshold": tensor([1.0, 1.0]), field: tensor([1.0, bad])})


def test_parameters_are_copies_in_one_dtype() -> None:
    theta, leak = tensor([1.0, 2.0]), torch.tensor(0.5)
    parameters = NeuronParameters(theta, leak=leak, initial=0.25)
    theta.zero_()
    assert parameters.threshold.tolist() == [1.0, 2.0]
    assert {parameters.leak.dtype, parameters.initial.dtype, parameters.amplitude.dtype} == {F64}


# The other timed layers


def test_repeat_puts_time_first() -> None:
    x = torch.arange(6.0).view(3, 2)
    out = Repeat(4)(x).unflatten(0, (4, 3))
    assert all(torch.equal(out[t], x) for t in range(4))
    assert torch.equal(Repeat(4).scan(x, None, 1)[0], x)


def test_accumulated_max_pool_is_the_pool_of_the_sum() -> None:
    generator = torch.Generator().manual_seed(5)
    steps, batch, channels = 7, 2, 3
    frames = torch.randint(-4, 9, (steps, batch, channels, 6, 4), generator=generator).double()
    layer = AccumulatedMaxPool(nn.MaxPool2d(2), steps)
    out = layer(frames.flatten(0, 1)).unflatten(0, (steps, batch))
    each_step = nn.functional.max_pool2d(frames.flatten(0, 1), 2).unflatten(0, (steps, batch))
    for sample in range(batch):
        for channel in range(channels):
            expected = oracles.max_pool_of_sums(frames[:, sample, channel].numpy(), 2)
            assert (out[:, sample, channel].cumsum(0).numpy() == expected).all()
    assert (each_step.sum(0) > out.sum(0)).any()
    assert (each_step.sum(0) >= out.sum(0)).all()
    stepped, state = [], None
    for frame in frames:
        pooled, state = layer.scan(frame, state, 1)
        stepped.append(pooled)
    assert torch.equal(torch.stack(stepped), out)
    assert torch.equal(layer(frames.flatten(0, 1)).unflatten(0, (steps, batch)), out)


@pytest.mark.parametrize(("stored", "acts"), [(1.25, 1.0), (-0.5, 0.0)])
def test_a_leak_that_training_left_outside_acts_as_the_bound(stored, acts):
    current = torch.full((4, 1), 0.4)
    neurons = [Neuron(NeuronParameters(torch.tensor(1.0), leak=leak), 4, constant_input=False) for leak in (0.5, acts)]
    with torch.no_grad():
        neurons[0].leak.fill_(stored)
    assert torch.equal(neurons[0](current), neurons[1](current))


def test_a_threshold_of_zero_stays_positive_in_half_precision():
    neuron = Neuron(NeuronParameters(torch.tensor(0.0)), 2, constant_input=True).half()
    neuron.requires_grad_()
    out = neuron(torch.ones(1, 3, dtype=torch.float16))
    assert int(out.ne(0).sum()) == 6
    out.sum().backward()
    assert bool(torch.isfinite(neuron.leak.grad).all())
