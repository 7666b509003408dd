"""Ultra-low-latency conversion: acceptance checks U1 to U10 of its specification, then the method's options."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quickspike as qs
from quickspike.activations import clip
from quickspike.api import tune
from quickspike.data import DataSet
from quickspike.evaluation import make_fabric
from quickspike.graph import Site
from quickspike.methods.ultra_low_latency import Criterion, UltraLowLatency, losses, search, staircase
from quickspike.neuron import Neuron, NeuronParameters, Surrogate
from quickspike.training import History, Trainer, Training
from quickspike.tuning import Tuning

F64 = torch.float64
SITE = Site("relu", "relu", None, (3, 2, 2))

# The reference distribution of the specification, as Python floats.
QUANTILES = [-0.3 + NormalDist().inv_cdf(q / 100) for q in range(1, 100)]
MU = -0.3 + NormalDist().inv_cdf(0.997)
CANDIDATES = [p for p in QUANTILES if 0 < p <= MU]

# T, signed (1, 1), squared (1, 1), q, alpha, beta, squared best, next best theta
TABLE = [
    (1, 25.354615, 26.690979, 79, 0.206890, 2.00, 4.784993, 4.785887),
    (2, 18.011271, 12.641860, 88, 0.357461, 1.51, 2.243362, 2.270011),
    (3, 13.115708, 6.503199, 92, 0.451458, 1.35, 1.340535, 1.377348),
    (5, 8.220145, 2.524752, 95, 0.549417, 1.21, 0.654571, 0.685864),
    (10, 4.058917, 0.616199, 97, 0.645807, 1.13, 0.234364, 0.246279),
    (50, 0.876801, 0.028495, 99, 0.827830, 1.02, 0.010356, 0.057234),
]


def tensor(value: object) -> Tensor:
    return torch.tensor(value, dtype=F64)


def case_count(p: float, theta: float, steps: int) -> int:
    """j of the half-open cell (j theta/T, (j+1) theta/T] that holds p; T above theta, 0 below 0. Exact arithmetic."""
    if p > theta:
        return steps
    exact, width = Fraction(p), Fraction(theta) / steps
    return next((j for j in range(steps) if j * width < exact <= (j + 1) * width), 0)


def case_errors(theta: float, beta: float, steps: int, percentiles: list[float] = QUANTILES, mu: float = MU) -> list[float]:
    """What every percentile adds to the loss, case by case as the paper has it."""
    errors = []
    for p in percentiles:
        if p < 0:
            errors.append(0.0)
        elif p <= theta:
            errors.append(p - case_count(p, theta, steps) * theta * beta / steps)
        else:
            errors.append(min(p, mu) - theta * beta)
    return errors


def loss_of(theta: float, beta: float, steps: int, criterion: str, mu: float = MU) -> float:
    return float(losses(tensor(QUANTILES), mu, tensor(theta), steps, criterion)[round(beta * 100)])


def test_the_reference_distribution() -> None:
    assert pytest.approx(2.447781, abs=1e-6) == MU
    assert len(CANDIDATES) == 38


@pytest.mark.parametrize(("current", "steps", "count"), [(4, 8, 3), (8, 8, 7), (3, 8, 2), (16, 8, 8), (2, 4, 0)])
def test_u1_staircase(current: int, steps: int, count: int) -> None:
    theta, beta = 8.0, 1.25
    neuron = Neuron(NeuronParameters(tensor(theta), amplitude=beta, strict=True), steps, True)
    out = neuron(tensor([float(current)]))
    assert int(out.ne(0).sum()) == count
    assert float(out.mean()) == beta * theta * count / steps
    assert float(staircase(tensor([float(current)]), tensor(theta), steps)) == theta * count / steps


@pytest.mark.parametrize("mu", [MU, 1.3])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 10, 35, 50])
def test_u2_the_vector_loss_is_the_case_wise_loss(steps: int, mu: float) -> None:
    for theta in [theta for theta in (*CANDIDATES, mu, 0.01, 1.0, 2.4) if theta <= mu]:
        for beta in (0.0, 0.37, 1.0, 1.51, 2.0):
            errors = case_errors(theta, beta, steps, mu=mu)
            assert loss_of(theta, beta, steps, "signed", mu) == pytest.approx(abs(sum(errors)), abs=1e-9), theta
            assert loss_of(theta, beta, steps, "squared", mu) == pytest.approx(sum(e * e for e in errors), abs=1e-9), theta


def test_u2_a_percentile_that_is_the_threshold_counts_one_spike_less() -> None:
    # A candidate is a percentile itself, so this tie occurs in every search.
    candidates = tensor(CANDIDATES)
    for steps in range(1, 65):
        counts = staircase(candidates[:, None], candidates[:, None], steps)[:, 0] * steps / candidates
        assert counts.round().unique().tolist() == [steps - 1]


@pytest.mark.parametrize(("steps", "signed", "squared"), [row[:3] for row in TABLE])
def test_u3_loss_of_the_plain_threshold(steps: int, signed: float, squared: float) -> None:
    assert loss_of(MU, 1.0, steps, "signed") == pytest.approx(signed, abs=1e-5)
    assert loss_of(MU, 1.0, steps, "squared") == pytest.approx(squared, abs=1e-5)


@pytest.mark.parametrize(("steps", "q", "alpha", "beta", "best", "second"), [(row[0], *row[3:]) for row in TABLE])
def test_u4_squared_search(steps: int, q: int, alpha: float, beta: float, best: float, second: float) -> None:
    theta, found = search(tensor(QUANTILES), MU, steps)
    assert theta == QUANTILES[q - 1]
    assert theta / MU == pytest.approx(alpha, abs=1e-6)
    assert found == pytest.approx(beta, abs=1e-12)
    errors = {candidate: sum(e * e for e in case_errors(candidate, least_beta(candidate, steps), steps)) for candidate in CANDIDATES}
    assert errors.pop(theta) == pytest.approx(best, abs=1e-6)
    assert loss_of(theta, found, steps, "squared") == pytest.approx(best, abs=1e-6)
    assert min(errors.values()) == pytest.approx(second, abs=1e-6)


def least_beta(theta: float, steps: int, percentiles: list[float] = QUANTILES, mu: float = MU) -> float:
    """sum(y h)/sum(h h), h = theta n/T, within [0, 2], on the grid of hundredths."""
    heights = [theta * case_count(p, theta, steps) / steps for p in percentiles]
    square = sum(h * h for h in heights)
    exact = sum(min(p, mu) * h for p, h in zip(percentiles, heights, strict=True)) / square if square else 0.0
    return round(100 * min(max(exact, 0.0), 2.0)) / 100


@pytest.mark.parametrize("criterion", ["squared", "signed"])
@pytest.mark.parametrize("initial", [0.0, 0.25, 0.5])
def test_the_search_minds_criterion_and_start(criterion: Criterion, initial: float) -> None:
    """Against all pairs, one by one; the loss of the pair that is found is the least that any has."""
    percentiles, steps = tensor(QUANTILES), 3
    theta, beta = search(percentiles, MU, steps, criterion, initial)

    def loss(theta: float, beta: float) -> float:
        counts = [sum(p > theta * (n - initial) / steps for n in range(1, steps + 1)) for p in QUANTILES]
        errors = [min(max(p, 0.0), MU) - beta * theta * count / steps for p, count in zip(QUANTILES, counts, strict=True)]
        return abs(sum(errors)) if criterion == "signed" else sum(error * error for error in errors)

    pairs = [(MU, 1.0), *((p, hundredths / 100) for p in QUANTILES if 0 < p <= MU for hundredths in range(201))]
    assert loss(theta, beta) == pytest.approx(min(loss(*pair) for pair in pairs), abs=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 50])
def test_u5_signed_search(steps: int) -> None:
    theta, beta = search(tensor(QUANTILES), MU, steps, "signed")
    loss = abs(sum(case_errors(theta, beta, steps)))
    assert loss <= abs(sum(case_errors(MU, 1.0, steps)))
    if steps == 1:
        assert beta == 2.0
        assert loss == pytest.approx(4.42, abs=0.005)
    else:
        assert loss < 0.01


def test_u5_many_thresholds_have_a_signed_loss_of_zero() -> None:
    given = staircase(tensor(QUANTILES), tensor(CANDIDATES)[:, None], 2).sum(-1)
    wanted = sum(min(max(p, 0.0), MU) for p in QUANTILES)
    assert int((wanted / given <= 2).sum()) == 17


def central(function: Callable[[float], float], at: float, step: float = 1e-6) -> float:
    return (function(at + step) - function(at - step)) / (2 * step)


@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_u6_clip_against_finite_differences(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(5, 3, 4, generator=generator, dtype=F64) for _ in range(2))
    mu = torch.rand(shape, generator=generator, dtype=F64) * 0.5 + 0.5
    assert min(float(x.abs().min()), float((x - mu).abs().min())) > 1e-4

    def value(x: Tensor, mu: Tensor) -> float:
        return float((weights * (x.relu() - (x - mu).relu())).sum())

    def slope(number: int, tensors: list[Tensor], entry: int) -> float:
        def along(entry_value: float) -> float:
            changed = [part.clone() for part in tensors]
            changed[number].view(-1)[entry] = entry_value
            return value(*changed)

        return central(along, float(tensors[number].reshape(-1)[entry]))

    for leaf in (x, mu):
        leaf.requires_grad_(True)
    y = clip(x, mu)
    (weights * y).sum().backward()
    with torch.no_grad():
        assert torch.equal(y, torch.minimum(x.clamp_min(0), mu))
        for number, leaf in enumerate((x, mu)):
            expected = tensor([slope(number, [x, mu], entry) for entry in range(leaf.numel())]).view(leaf.shape)
            assert torch.allclose(leaf.grad, expected, rtol=0, atol=1e-8)
            assert float(expected.abs().max()) > 0.1


def test_u6_the_ceiling_learns_from_clipped_elements_only() -> None:
    mu = tensor(1.0).requires_grad_(True)
    x = tensor([-1.0, 0.0, 0.5, 1.0, 1.5, 4.0]).requires_grad_(True)
    clip(x, mu).mul(tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 4.0, 8.0, 0.0, 0.0]
    assert float(mu.grad) == 48.0
    ceiling = UltraLowLatency().activation(SITE).train()
    with torch.no_grad():
        ceiling(torch.ones(1, 3, 2, 2))
    ceiling.start(torch.tensor([1.0]))
    for height, gradient in ((0.9, 0.0), (1.1, 12.0)):
        ceiling.zero_grad(set_to_none=False)
        ceiling(torch.full((1, 3, 2, 2), height)).sum().backward()
        assert float(ceiling.mu.grad) == gradient


def boxcar_primitive(z: float, scale: float) -> float:
    return scale * (min(max(z, -1.0), 1.0) + 1)


def layer(currents: list[float], theta: float, leak: float) -> tuple[list[int], list[float]]:
    """Spikes, and z = U/theta - 1, of one neuron with a hard reset."""
    v, spikes, zs = 0.0, [], []
    for current in currents:
        m = leak * v + current
        spikes.append(int(m > theta))
        zs.append(m / theta - 1)
        v = m - theta * spikes[-1]
    return spikes, zs


U7 = {"theta": 1.0, "leak": 0.9, "beta": 1.5, "scale": 0.5}


def smooth_loss(theta: float = U7["theta"], leak: float = U7["leak"]) -> float:
    """sum_t beta theta G(z_t)."""
    return U7["beta"] * theta * sum(boxcar_primitive(z, U7["scale"]) for z in layer([0.6] * 5, theta, leak)[1])


def test_u7_smooth_loss_and_its_slopes() -> None:
    assert layer([0.6] * 5, 1.0, 0.9)[0] == [0, 1, 0, 1, 0]
    assert smooth_loss() == pytest.approx(3.410595, abs=1e-9)
    assert central(lambda theta: smooth_loss(theta=theta), 1.0) == pytest.approx(-2.504250, abs=1e-8)
    assert central(lambda leak: smooth_loss(leak=leak), 0.9) == pytest.approx(3.056700, abs=1e-8)


def test_u7_the_spiking_layer_has_the_slopes_of_the_smooth_one() -> None:
    parameters = NeuronParameters(tensor(1.0), leak=0.9, amplitude=1.5, strict=True)
    neuron = Neuron(parameters, 5, False, Surrogate("boxcar", scale=0.5)).requires_grad_(True)
    out = neuron(tensor([[0.6]] * 5))
    assert out.flatten().tolist() == [0.0, 1.5, 0.0, 1.5, 0.0]
    out.sum().backward()
    # Only the direct term differs: o stands where G stood.
    spikes, zs = layer([0.6] * 5, 1.0, 0.9)
    direct = 1.5 * sum(o - boxcar_primitive(z, 0.5) for o, z in zip(spikes, zs, strict=True))
    assert float(neuron.leak.grad) == pytest.approx(3.056700, abs=1e-8)
    assert float(neuron.leak.grad) == pytest.approx(central(lambda leak: smooth_loss(leak=leak), 0.9), abs=1e-8)
    assert float(neuron.threshold.grad) == pytest.approx(-2.914845, abs=1e-8)
    assert float(neuron.threshold.grad) == pytest.approx(central(lambda theta: smooth_loss(theta=theta), 1.0) + direct, abs=1e-8)


def test_u7_the_methods_surrogate() -> None:
    assert UltraLowLatency().surrogate() == Surrogate("boxcar", width=1.0, scale=1.0)
    assert UltraLowLatency(peak=0.5).surrogate() == Surrogate("boxcar", width=1.0, scale=0.5)
    assert UltraLowLatency(gradient="published").surrogate().unscaled
    u = tensor([-1.5, -1.0, -0.999, 0.0, 0.999, 1.0, 1.5])
    assert Surrogate("boxcar", scale=0.5).derivative(u).tolist() == [0.0, 0.0, 0.5, 0.5, 0.5, 0.0, 0.0]


def test_the_published_gradient_leaves_the_height_out_and_counts_every_element() -> None:
    parameters = NeuronParameters(tensor(1.0), leak=0.9, amplitude=1.5, strict=True)
    surrogate = UltraLowLatency(gradient="published").surrogate()
    neuron = Neuron(parameters, 5, False, surrogate).requires_grad_(True)
    weights = [0.3, -0.7, 1.1, 0.4, -0.2]
    current = tensor([[0.6]] * 5).requires_grad_(True)
    out = neuron(current)
    assert out.flatten().tolist() == [0.0, 1.5, 0.0, 1.5, 0.0]
    (out.flatten() * tensor(weights)).sum().backward()

    def value(theta: float = 1.0, leak: float = 0.9, first: float = 0.6) -> float:
        zs = layer([first, 0.6, 0.6, 0.6, 0.6], theta, leak)[1]
        # z only through the surrogate of height 1, and theta times the gradient of all elements.
        return sum(g * boxcar_primitive(z, 1.0) for g, z in zip(weights, zs, strict=True))

    assert float(neuron.leak.grad) == pytest.approx(central(lambda leak: value(leak=leak), 0.9), abs=1e-8)
    assert float(current.grad[0]) == pytest.approx(central(lambda first: value(first=first), 0.6), abs=1e-8)
    assert float(neuron.threshold.grad) == pytest.approx(central(lambda theta: value(theta=theta), 1.0) + sum(weights), abs=1e-8)


def pooling_network() -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 5),
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            spread = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64) * spread)
    return network.eval()


def pictures(number: int, seed: int) -> Tensor:
    return torch.randn(number, 2, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=F64)


def pooled_values(snn: qs.SpikingNetwork, images: Tensor) -> list[Tensor]:
    """What every max-pooling layer gave."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: seen.append(out)) for module in snn.modules() if isinstance(module, nn.MaxPool2d)
    ]
    with torch.no_grad():
        snn(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_u8_folding_the_height_into_the_next_weights(steps: int) -> None:
    snn = qs.convert(pooling_network(), pictures(40, 2), UltraLowLatency(steps=steps, pool="spikes"))
    folded, images = copy.deepcopy(snn), pictures(30, 3)
    for site, following in (("1", "3"), ("4", "7"), ("8", "9")):
        neuron = folded.neuron(site)
        with torch.no_grad():
            folded.network.get_submodule(following).weight.mul_(neuron.amplitude * neuron.threshold)
            neuron.amplitude.fill_(1)
        neuron.scaled = False
    with torch.no_grad():
        run, binary = snn.run(images), folded.run(images)
    assert torch.allclose(run.logits, binary.logits, rtol=0, atol=1e-10)
    for site, counts in run.spikes.items():
        assert torch.equal(counts, binary.spikes[site])
        assert 0.01 < run.rates[site] < 0.99
    for values in pooled_values(folded, images):
        assert set(values.unique().tolist()) == {0.0, 1.0}


def test_u8_max_pooled_spikes_are_spikes() -> None:
    snn = qs.convert(pooling_network(), pictures(40, 2), UltraLowLatency(steps=3, pool="spikes"))
    heights = [float(snn.neuron(site).amplitude * snn.neuron(site).threshold) for site in ("1", "4")]
    values = pooled_values(snn, pictures(30, 3))
    assert [set(value.unique().tolist()) for value in values] == [{0.0, height} for height in heights]
    # Not so by default, where the pooling stands in front of the neurons and sees currents.
    accumulated = qs.convert(pooling_network(), pictures(40, 2), UltraLowLatency(steps=3))
    assert min(len(value.unique()) for value in pooled_values(accumulated, pictures(30, 3))) > 2


# Fine-tuning


@dataclass(frozen=True, kw_only=True)
class Watching(Trainer):
    """Keeps thresholds, leaks and amplitudes as every optimiser step left them, before and after they are put in bounds."""

    before: list[dict[str, list[float]]] = field(default_factory=list)
    after: list[dict[str, list[float]]] = field(default_factory=list)
    gradients: list[Any] = field(default_factory=list)

    def __call__(self, module: nn.Module, stage: str, *, after_step: Any = None, **more: Any) -> History:
        neurons = module.neurons().values()

        def values() -> dict[str, list[float]]:
            return {name: [float(getattr(neuron, name)) for neuron in neurons] for name in ("threshold", "leak", "amplitude")}

        def watch() -> None:
            self.before.append(values())
            after_step()
            self.after.append(values())
            self.gradients.extend(neuron.amplitude.grad for neuron in neurons)
            assert not any(neuron.amplitude.requires_grad for neuron in neurons)

        return super().__call__(module, stage, after_step=watch, **more)


def trainer(digits: DataSet, **settings: Any) -> Watching:
    chosen = {"epochs": 1, "batch_size": 64, "optimiser": "adam", "learning_rate": 0.02, "weight_decay": 0.0, "schedule": "constant"}
    return Watching(fabric=make_fabric("cpu"), data=digits, settings=Training(**(chosen | settings)))


@pytest.fixture(scope="module")
def small(digits_calibration: Tensor) -> qs.SpikingNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10, bias=False)
        )  # fmt: skip
    return qs.convert(network, digits_calibration, UltraLowLatency(steps=3))


def test_u9_dropout_silences_the_same_neurons_at_every_step() -> None:
    steps, batch, count = 4, 3, 400
    neuron = Neuron(NeuronParameters(tensor(1.0), amplitude=1.5, strict=True), steps, True).train()
    neuron.dropout = 0.25
    masks = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(2):
            out = neuron(torch.full((batch, count), 2.0, dtype=F64)).unflatten(0, (steps, batch))
            assert all(torch.equal(out[0], later) for later in out[1:])
            masks.append(out[0] / 1.5)
    for mask in masks:
        assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
        assert float(mask.eq(0).double().mean()) == pytest.approx(0.25, abs=0.05)
        assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(*masks)
    assert set(neuron.eval()(torch.full((batch, count), 2.0, dtype=F64)).unique().tolist()) == {1.5}


def test_u9_dropout_of_a_whole_network_while_it_is_tuned(small: qs.SpikingNetwork, digits: DataSet) -> None:
    silent: dict[str, list[Tensor]] = {site: [] for site in small.neurons()}

    class Looking(Watching):
        def __call__(self, module: nn.Module, stage: str, **more: Any) -> History:
            for site, neuron in module.neurons().items():
                neuron.register_forward_hook(lambda layer, _, out, site=site: self.look(site, layer, out))
            return super().__call__(module, stage, **more)

        @staticmethod
        def look(site: str, layer: Neuron, out: Tensor) -> None:
            # A neuron is seen through if it fires at all: then it is scaled by 1/(1 - p) whenever it fires.
            if not layer.training:
                return
            height = (layer.amplitude * layer.threshold).detach() / 0.5
            values = out.detach().unflatten(0, (layer.steps, -1))
            assert torch.allclose(values, values.ne(0) * height, rtol=1e-5, atol=0)
            silent[site].append(values.eq(0).all(0))

    watched = trainer(digits, batch_size=256)
    tuned = tune(small, Looking(**{name: getattr(watched, name) for name in ("fabric", "data", "settings")}), Tuning(dropout=0.5))
    for site, batches in silent.items():
        assert len(batches) == 5
        assert all(float(batch.double().mean()) > 0.45 for batch in batches)
        assert not torch.equal(batches[0], batches[1])
        assert tuned.neuron(site).dropout == 0


def test_u9_the_leak_never_exceeds_one(small: qs.SpikingNetwork, digits: DataSet) -> None:
    watched = trainer(digits)
    tuned = tune(small, watched, Tuning())
    assert len(watched.after) == 1347 // 64
    # Steps did try to leave the range.
    assert max(leak for step in watched.before for leak in step["leak"]) > 1
    assert all(0 <= leak <= 1 for step in watched.after for leak in step["leak"])
    assert min(watched.after[-1]["leak"]) < 1
    assert [neuron.leak.item() for neuron in tuned.neurons().values()] == watched.after[-1]["leak"]


def test_u10_the_height_follows_the_threshold_by_a_constant_factor(small: qs.SpikingNetwork, digits: DataSet) -> None:
    watched = trainer(digits)
    tuned = tune(small, watched, Tuning())
    assert watched.gradients
    assert all(gradient is None for gradient in watched.gradients)
    start = {name: float(neuron.amplitude) for name, neuron in small.neurons().items()}
    assert all(step["amplitude"] == list(start.values()) for step in watched.after)
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for name, neuron in tuned.neurons().items():
        theta = neuron.threshold.item()
        assert theta != float(small.neuron(name).threshold)
        assert float(neuron.amplitude) == start[name] != 1.0
        heights: list[Tensor] = []
        hook = neuron.register_forward_hook(lambda _, __, out, heights=heights: heights.append(out.max()))
        with torch.no_grad():
            tuned(images)
        hook.remove()
        assert float(heights[0]) == pytest.approx(start[name] * theta, rel=1e-6)


def test_a_threshold_that_training_pushes_below_zero_stays_positive(small: qs.SpikingNetwork, digits: DataSet) -> None:
    snn = copy.deepcopy(small)
    with torch.no_grad():
        for neuron in snn.neurons().values():
            neuron.threshold.fill_(0.01)
    watched = trainer(digits, optimiser="sgd", learning_rate=0.5, momentum=0.0, clip=1.0)
    tuned = tune(snn, watched, Tuning(weights=False, leaks=False))
    assert min(theta for step in watched.before for theta in step["threshold"]) < 0
    assert min(theta for step in watched.after for theta in step["threshold"]) > 0
    assert all(neuron.threshold > 0 for neuron in tuned.neurons().values())
    assert bool(torch.isfinite(tuned(torch.randn(4, 1, 8, 8))).all())


# The method's options


def rank_percentiles(values: Tensor) -> list[float]:
    """P[q], q = 1..99: the k-th smallest value, k = 1 + round(0.01 q (N - 1))."""
    ordered = sorted(values.flatten().tolist())
    return [ordered[round(0.01 * q * (len(ordered) - 1))] for q in range(1, 100)]


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_every_layer_gets_what_the_search_finds_on_its_own_preactivations(steps: int) -> None:
    network, images = pooling_network(), pictures(400, 4)
    snn = qs.convert(network, images, UltraLowLatency(steps=steps, pool="spikes", percentile=100))
    seen: dict[str, Tensor] = {}
    for name in ("1", "4", "8"):
        network.get_submodule(name).register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0]}))
    with torch.no_grad():
        network(images)
    for name, neuron in snn.neurons().items():
        percentiles, mu = rank_percentiles(seen[name]), float(seen[name].max())

        def error(theta: float, beta: float, percentiles: list[float] = percentiles, mu: float = mu) -> float:
            return sum(e * e for e in case_errors(theta, beta, steps, percentiles, mu))

        candidates = [theta for theta in percentiles if 0 < theta <= mu]
        least = min(error(theta, least_beta(theta, steps, percentiles, mu)) for theta in candidates)
        assert least < 0.3 * error(mu, 1.0)
        # Percentiles come from a histogram of 2048 bins; one of them in the next cell is 7 % of the loss.
        assert error(float(neuron.threshold), float(neuron.amplitude)) < 1.1 * least
        assert neuron.threshold.ndim == neuron.leak.ndim == neuron.amplitude.ndim == 0
        assert (float(neuron.initial), float(neuron.leak), neuron.scaled, neuron.strict) == (0.0, 1.0, True, True)


def test_the_factor_on_the_height_of_the_published_code() -> None:
    images = pictures(20, 5)
    plain, louder = (qs.convert(pooling_network(), images, UltraLowLatency(amplitude_factor=factor)) for factor in (1.0, 1.3))
    for site in plain.sites:
        assert float(louder.neuron(site.name).amplitude) == pytest.approx(1.3 * float(plain.neuron(site.name).amplitude), rel=1e-6)
        assert torch.equal(louder.neuron(site.name).threshold, plain.neuron(site.name).threshold)


@pytest.mark.parametrize("initial", [0.25, 0.5])
def test_the_search_knows_the_initial_potential(initial: float) -> None:
    theta, steps = 8.0, 4
    currents = [-3.0, 0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 8.0, 9.0, 20.0]
    neuron = Neuron(NeuronParameters(tensor(theta), initial=initial, strict=True), steps, True)
    fired = neuron(tensor(currents)).unflatten(0, (steps, -1)).mean(0)
    assert torch.equal(staircase(tensor(currents), tensor(theta), steps, initial), fired)


def test_a_training_starts_from_the_given_ceiling_and_converts_the_trained_one() -> None:
    images, ceilings = pictures(30, 6), []

    class Raise:
        """Stands for a training: moves every ceiling to 2.5."""

        fabric = make_fabric("cpu")

        def __call__(self, module: nn.Module, stage: str, *, groups: Any, **_: Any) -> History:
            (learned,) = [group for group in groups if group.get("weight_decay") == 5e-4]
            with torch.no_grad():
                for mu in learned["params"]:
                    ceilings.append(float(mu))
                    mu.fill_(2.5)
            return History(stage)

    snn = qs.convert(pooling_network(), images, UltraLowLatency(start=4.0), trainer=Raise())
    assert ceilings == [4.0, 4.0, 4.0]
    assert all(0 < float(neuron.threshold) <= 2.5 * (1 + 1e-6) for neuron in snn.neurons().values())
