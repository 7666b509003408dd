"""Conversion and simulation: two ways of running agree, errors fall as 1/T, and a spiking network is an ordinary module."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oracles
import quickspike as qs
from quickspike.activations import ClippedReLU
from quickspike.anatomy import anatomy_of
from quickspike.conversion import prepare, to_spiking
from quickspike.data import ImageStream
from quickspike.errors import ConversionError, DataError, OptionError
from quickspike.graph import Site, Traced, swap, trace
from quickspike.method import all_methods, create
from quickspike.neuron import MAX_STEPS, AccumulatedMaxPool, Neuron, NeuronParameters, Repeat
from quickspike.simulation import Run, simulate

Make = Callable[..., qs.SpikingNetwork]
Networks = Callable[..., nn.Module]
Images = Callable[..., Tensor]
F64 = torch.float64
STEPS = [8, 16, 32, 64, 128, 256]

ALL = pytest.mark.parametrize("name", ["chain", "residual", "concat", "pooled", "perceptron"])


@pytest.fixture
def dyadic(convert_given: Make, dyadic_network: Networks, dyadic_images: Images, dyadic_parameters: Callable[..., object]) -> Make:
    """dyadic(name, steps, leak): a converted network in which every sum is exact."""

    def make(name: str, steps: int = 8, leak: float = 1.0, dtype: torch.dtype = F64, **more: object) -> qs.SpikingNetwork:
        images = dyadic_images(name, 2, dtype=dtype)
        return convert_given(dyadic_network(name, dtype=dtype), images, dyadic_parameters(leak, dtype, **more), steps)

    return make


@pytest.fixture
def random_snn(random_network: Networks, random_images: Images) -> Make:
    """random_snn(name, steps, **options): a float64 network converted by threshold balancing."""

    def make(name: str, steps: int = 8, **options: object) -> qs.SpikingNetwork:
        return qs.convert(random_network(name), random_images(name, 40, seed=1), "threshold_balancing", steps=steps, **options)

    return make


def same(one: Run, other: Run) -> None:
    assert torch.equal(one.logits, other.logits)
    assert one.spikes.keys() == other.spikes.keys()
    for site, counts in one.spikes.items():
        assert torch.equal(counts, other.spikes[site]), site


def alike(one: Run, other: Run) -> None:
    assert torch.allclose(one.logits, other.logits, rtol=0, atol=1e-10)
    assert one.spikes.keys() == other.spikes.keys()
    for site, counts in one.spikes.items():
        assert torch.equal(counts, other.spikes[site]), site


def alive(run: Run) -> None:
    """The comparison means something: no site is silent or saturated, and images differ."""
    assert all(0.01 < rate < 0.99 for rate in run.rates.values()), run.rates
    assert run.logits[-1].std(0).max() > 0


# Layer by layer against step by step


@ALL
@pytest.mark.parametrize("leak", [1.0, 0.5])
def test_both_simulations_agree_bit_for_bit(name: str, leak: float, dyadic: Make, dyadic_images: Images) -> None:
    snn = dyadic(name, 8, leak)
    images = dyadic_images(name, 5, seed=2)
    with torch.no_grad():
        run = simulate(snn, images)
        same(run, simulate(snn, images, step_by_step=True))
        assert torch.equal(snn(images), run.logits[-1])
    alive(run)


@ALL
def test_exact_sums_do_not_depend_on_the_dtype(name: str, dyadic: Make, dyadic_images: Images) -> None:
    snn, images = dyadic(name, 8), dyadic_images(name, 3, seed=3)
    single = dyadic(name, 8, dtype=torch.float32)
    converted = copy.deepcopy(snn).to(torch.float32)
    with torch.no_grad():
        run = snn.run(images)
        for other in (single, converted):
            assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}
            got = other.run(images.float())
            assert got.logits.dtype == torch.float32
            same(Run(got.logits.double()[[0, 1, 3, 7]], got.spikes), Run(run.logits[[0, 1, 3, 7]], run.spikes))


@ALL
def test_both_simulations_agree_on_random_networks(name: str, random_snn: Make, random_images: Images) -> None:
    snn, images = random_snn(name, 12), random_images(name, 6, seed=2)
    with torch.no_grad():
        run = simulate(snn, images)
        alike(run, simulate(snn, images, step_by_step=True))
    alive(run)


def test_timed_layers_stand_where_they_must(dyadic: Make) -> None:
    def kinds(name: str, kind: type[nn.Module]) -> int:
        return sum(isinstance(module, kind) for module in dyadic(name).modules())

    assert kinds("residual", Repeat) == 1
    assert kinds("concat", Repeat) == 1
    assert kinds("chain", Repeat) == 0
    assert kinds("pooled", AccumulatedMaxPool) == 2
    assert kinds("residual", Neuron) == 4


def test_a_network_equals_its_scalar_reference(
    dyadic: Make, dyadic_network: Networks, dyadic_images: Images, dyadic_parameters: Callable[..., Callable[[Site], NeuronParameters]]
) -> None:
    for leak in (1.0, 0.5):
        snn = dyadic("perceptron", 8, leak)
        source, images = dyadic_network("perceptron"), dyadic_images("perceptron", 6, seed=4)
        given = {site.name: dyadic_parameters(leak)(site) for site in snn.sites}
        layers = []
        for layer, site in ((source[0], "1"), (source[2], "3")):
            theta = given[site].threshold.numpy()
            layers.append({"weight": layer.weight.detach().numpy(), "bias": layer.bias.detach().numpy(), "theta": theta})
            layers[-1] |= {"v0": theta / 2, "leak": leak}
        head = {"weight": source[4].weight.detach().numpy(), "bias": source[4].bias.detach().numpy()}
        with torch.no_grad():
            run = snn.run(images)
        for row, image in enumerate(images.numpy()):
            logits, counts = oracles.spiking_mlp(layers, head, image, 8)
            assert np.array_equal(run.logits[:, row].numpy(), logits)
            assert np.array_equal(run.spikes["1"][row].numpy(), counts[0])
            assert np.array_equal(run.spikes["3"][row].numpy(), counts[1])


def test_neurons_get_what_the_method_decided(convert_given: Make, dyadic_network: Networks, dyadic_images: Images) -> None:
    def parameters(site: Site) -> NeuronParameters:
        theta = torch.arange(1, site.channels + 1, dtype=F64) / 8
        return NeuronParameters(site.per_channel(theta), initial=0.25, leak=0.5, amplitude=2.0, scaled=False, strict=True)

    snn = convert_given(dyadic_network("chain"), dyadic_images("chain", 2), parameters, 3)
    for site in snn.sites:
        neuron, wanted = snn.neuron(site.name), parameters(site)
        for field in ("threshold", "initial", "leak", "amplitude"):
            assert torch.equal(getattr(neuron, field), getattr(wanted, field)), field
        assert (neuron.steps, neuron.scaled, neuron.strict) == (3, False, True)


# Error against the clipped network


class Gain(nn.Module):
    """A spike of another height than theta scales the clipped activation."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def clipped(ann: Traced, decided: dict[str, NeuronParameters]) -> nn.Module:
    """The prepared network with clip(x, 0, theta) at every site: what the neurons approach as T grows."""

    def at(site: Site, _: nn.Module) -> nn.Module:
        chosen = decided[site.name]
        return nn.Sequential(ClippedReLU(chosen.threshold), Gain(chosen.amplitude / (1 if chosen.scaled else chosen.threshold)))

    return swap(ann, at).module


@pytest.mark.parametrize("name", ["chain", "pooled", "residual"])
@pytest.mark.parametrize("method_name", sorted(all_methods()))
def test_the_error_falls_as_one_over_steps(method_name: str, name: str, random_network: Networks, random_images: Images) -> None:
    method = create(method_name, steps=STEPS[-1])
    traced = trace(random_network(name), random_images(name, 1))
    ann = prepare(traced, method)
    method.fit(ann, ImageStream(random_images(name, 60, seed=1)))
    # From the method and not from the spiking network, so that a threshold that to_spiking changes shows.
    decided = {site.name: method.neuron(site, ann.at(site)) for site in ann.sites}
    if any(bool((chosen.leak != 1).any()) for chosen in decided.values()):
        pytest.skip("the method's neurons leak")
    # Brighter than the calibration images: unless a good share of the activations is clipped, the exact value of theta hardly shows.
    images = random_images(name, 32, seed=2) * 3
    snn = to_spiking(ann, method, {})
    with torch.no_grad():
        target = clipped(ann, decided)(images)
        logits = snn.run(images).logits
    errors = [float((logits[steps - 1] - target).abs().mean()) for steps in STEPS]
    assert -1.15 <= oracles.slope(STEPS, errors) <= -0.85, errors


def test_the_first_step_of_one_layer_has_the_closed_form_error(convert_given: Make) -> None:
    source = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double().eval()
    with torch.no_grad():
        for layer in (source[0], source[2]):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    z = torch.arange(-32, 97, dtype=F64)[:, None] / 64
    snn = convert_given(source, z, lambda site: NeuronParameters(torch.tensor(1.0, dtype=F64), initial=0.5), 8)
    with torch.no_grad():
        logits = snn.run(z).logits
    for t in (1, 2, 4, 8):
        assert np.array_equal(logits[t - 1].numpy(), oracles.staircase(z.numpy(), 1.0, t, 0.5))


def test_bounded_activations_keep_their_bound(random_images: Images) -> None:
    generator = torch.Generator().manual_seed(0)
    source = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU6(), nn.Conv2d(4, 3, 3, padding=1), nn.Hardtanh(0, 0.5), nn.Flatten())
    source = nn.Sequential(*source, nn.Linear(192, 5)).double().eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64))
    images = random_images("chain", 30)
    assert source[0](images).max() > 8
    for method in ("threshold_balancing", "potential_init"):
        snn = qs.convert(source, images, method, steps=256, ceiling="percentile", percentile=100)
        assert 5 < snn.neuron("1").threshold.max() <= 6
        assert snn.neuron("3").threshold.max() <= 0.5
        with torch.no_grad():
            error = (snn(images) - source(images)).abs().mean() / source(images).abs().mean()
        assert error < 0.02


# What precedes the first neuron, and the readout


def test_the_part_before_the_first_neuron_runs_once(dyadic: Make, dyadic_images: Images) -> None:
    snn, images = dyadic("residual", 8), dyadic_images("residual", 3)
    seen: dict[str, list[int]] = {}
    for name, module in snn.network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, args, __, name=name: seen.setdefault(name, []).append(len(args[0])))
    with torch.no_grad():
        snn(images)
    assert seen == {"stem": [3], "conv1": [24], "conv2": [24], "conv3": [24]}


def test_constant_activations_give_the_source_logits_at_every_step(convert_given: Make) -> None:
    """C6: where every layer transmits its activation exactly, the summed readout is T times the source's logits."""
    generator = torch.Generator().manual_seed(0)
    source = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).double().eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
    images = torch.randint(0, 2, (20, 6), generator=generator).double()
    one = NeuronParameters(torch.tensor(1.0, dtype=F64), initial=0.5)
    snn = convert_given(source, images, lambda _: one, 7)
    with torch.no_grad():
        expected = clipped(trace(source, images), {"1": one, "3": one})(images)
        outputs = snn.outputs(images)
        assert torch.equal(outputs.cumsum(0), expected * torch.arange(1, 8, dtype=F64).view(-1, 1, 1))
        assert torch.equal(snn.run(images).logits, expected.expand(7, -1, -1))
    assert expected.std(0).min() > 0


@ALL
def test_readout_inside_a_run_equals_a_shorter_run(name: str, dyadic: Make, random_snn: Make, dyadic_images: Images) -> None:
    """C8."""
    images = dyadic_images(name, 3, seed=5)
    for snn, compare in ((dyadic(name, 8), same), (random_snn(name, 8), alike)):
        with torch.no_grad():
            run = snn.run(images)
            for t in (1, 3, 8):
                short = snn.with_steps(t).run(images)
                assert short.steps == len(short.logits) == t
                compare(Run(run.logits[:t], {}), Run(short.logits, {}))
            compare(run, snn.with_steps(2).with_steps(8).run(images))


def test_with_steps_leaves_the_original_alone_and_refuses_nonsense(dyadic: Make, dyadic_images: Images) -> None:
    snn = dyadic("concat", 4)
    longer = snn.with_steps(9)
    assert (snn.steps, longer.steps) == (4, 9)
    with torch.no_grad():
        assert len(snn.run(dyadic_images("concat", 1)).logits) == 4
        longer.neuron("relu").threshold.zero_()
    assert snn.neuron("relu").threshold.min() > 0
    for bad in (0, -1, 1.5, True, "4"):
        with pytest.raises(OptionError, match="steps"):
            snn.with_steps(bad)


@pytest.mark.parametrize(
    ("derived", "changed"),
    [
        (lambda snn: snn.as_synchronous(), lambda neuron: neuron.averaged),
        (lambda snn: snn.as_signed(), lambda neuron: neuron.signed),
        (lambda snn: snn.with_reset("zero"), lambda neuron: neuron.to_zero),
    ],
    ids=["synchronous", "signed", "reset"],
)
def test_what_is_derived_leaves_the_original_alone(
    derived: Callable[[qs.SpikingNetwork], qs.SpikingNetwork], changed: Callable[[Neuron], bool], dyadic: Make
) -> None:
    snn = dyadic("concat", 4)
    other = derived(snn)
    assert all(changed(neuron) for neuron in other.neurons().values())
    assert not any(changed(neuron) for neuron in snn.neurons().values())
    with torch.no_grad():
        other.neuron("relu").threshold.zero_()
    assert snn.neuron("relu").threshold.min() > 0


def test_what_has_no_place_for_first_runs_says_so(digits_source: nn.Module, digits_calibration: Tensor) -> None:
    snn = qs.convert(digits_source, digits_calibration, qs.methods.ThresholdBalancing(steps=4) | qs.refinements.OffsetShift())
    (first, *_) = snn.neurons()
    for what, derive in {
        "a synchronous network": snn.as_synchronous,
        "a network that takes spikes back": snn.as_signed,
        "a reset to 0": lambda: snn.with_reset("zero"),
    }.items():
        with pytest.raises(
            OptionError, match=rf"^{what} has no place for neurons that go through the first steps twice \({first}\); convert "
        ):
            derive()


def test_steps_go_up_to_their_limit(dyadic: Make) -> None:
    assert dyadic("concat", 1).with_steps(MAX_STEPS).steps == MAX_STEPS
    with pytest.raises(OptionError, match="steps"):
        dyadic("concat", 1).with_steps(MAX_STEPS + 1)


def test_neurons_have_the_surrogate_that_is_given_or_that_of_the_method(digits_source: nn.Module, digits_calibration: Tensor) -> None:
    own, given = create("diet_snn", steps=2).surrogate(), qs.Surrogate("arctan", 0.7, 0.4)
    assert own not in (qs.Surrogate(), given)
    for surrogate, wanted in ((None, own), (given, given)):
        snn = qs.convert(digits_source, digits_calibration, "diet_snn", steps=2, surrogate=surrogate)
        assert {neuron.surrogate for neuron in snn.neurons().values()} == {wanted}


def test_amplitudes_fold_into_the_next_weights(random_snn: Make, random_images: Images) -> None:
    """C4."""
    snn, images = random_snn("chain", 8), random_images("chain", 6, seed=3)
    folded = copy.deepcopy(snn)
    with torch.no_grad():
        for site, after in (("relu1", "conv2"), ("relu2", "conv3"), ("relu3", "head")):
            neuron, layer = folded.neuron(site), folded.network.get_submodule(after)
            theta = neuron.threshold.to(F64)
            layer.weight.mul_(theta.reshape(1, -1, *(1,) * (layer.weight.ndim - 2)))
            neuron.scaled = False
            neuron.amplitude.fill_(1.0)
        alike(snn.run(images), folded.run(images))


# An ordinary module


@ALL
def test_calls_do_not_depend_on_each_other(name: str, dyadic: Make, dyadic_images: Images) -> None:
    """C7."""
    used, fresh = dyadic(name), dyadic(name)
    images = dyadic_images(name, 4, seed=6)
    with torch.no_grad():
        used(dyadic_images(name, 4, seed=7) * 2)
        used.run(dyadic_images(name, 3, seed=8))
        run = fresh.run(images)
        same(used.run(images), run)
        same(used.run(images), run)
        for row in range(4):
            alone = used.run(images[row : row + 1])
            chosen = {site: counts[row : row + 1] for site, counts in run.spikes.items()}
            same(alone, Run(run.logits[:, row : row + 1], chosen))


@ALL
def test_state_dict_and_copies(name: str, dyadic: Make, dyadic_images: Images) -> None:
    snn, images = dyadic(name), dyadic_images(name, 3)
    other = copy.deepcopy(snn)
    with torch.no_grad():
        expected = snn.run(images)
        for parameter in other.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(other(images), expected.logits[-1])
        same(snn.run(images), expected)
        other.load_state_dict(snn.state_dict(), strict=True)
        same(other.run(images), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, random_snn: Make, random_images: Images) -> None:
    snn = random_snn("residual").to(dtype)
    images = random_images("residual", 8).to(dtype)
    with torch.no_grad():
        run = snn.run(images)
        assert run.logits.dtype == dtype
        assert torch.isfinite(run.logits).all()
        alive(run)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_a_source_network_of_another_dtype_converts(
    granularity: str, dtype: torch.dtype, random_network: Networks, random_images: Images
) -> None:
    source, images = random_network("chain").to(dtype), random_images("chain", 20).to(dtype)
    snn = qs.convert(source, images, "threshold_balancing", steps=4, granularity=granularity)
    with torch.no_grad():
        logits = snn(images)
    assert logits.dtype == dtype
    assert {parameter.dtype for parameter in snn.parameters()} == {dtype}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_without_graph_breaks(backend: str, dyadic: Make, dyadic_images: Images) -> None:
    snn, images = dyadic("residual", 3), dyadic_images("residual", 2)
    torch.compiler.reset()
    compiled = torch.compile(snn, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(images), snn(images))
    torch.compiler.reset()


@ALL
def test_weights_and_thresholds_learn(name: str, random_snn: Make, random_images: Images) -> None:
    snn, images = random_snn(name, 4), random_images(name, 8, seed=4)
    nn.functional.cross_entropy(snn(images), torch.arange(8) % 5).backward()
    neurons = {id(parameter) for module in snn.modules() if isinstance(module, Neuron) for parameter in module.parameters()}
    for path, parameter in snn.named_parameters():
        if id(parameter) in neurons:
            assert parameter.grad is None, path
        else:
            assert torch.isfinite(parameter.grad).all(), path
            assert parameter.grad.abs().max() > 0, path
    snn.zero_grad()
    for module in snn.modules():
        if isinstance(module, Neuron):
            module.threshold.requires_grad_(True)
    nn.functional.cross_entropy(snn(images), torch.arange(8) % 5).backward()
    for site in snn.sites:
        assert snn.neuron(site.name).threshold.grad.abs().max() > 0, site.name


def test_gradients_agree_between_both_simulations(random_snn: Make, random_images: Images) -> None:
    snn, images = random_snn("pooled", 4), random_images("pooled", 4, seed=4)
    gradients = []
    for step_by_step in (False, True):
        snn.zero_grad()
        simulate(snn, images, step_by_step=step_by_step).logits[-1].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in snn.parameters() if parameter.grad is not None])
    assert gradients[0]
    assert all(torch.allclose(one, other, atol=1e-10) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 8, 8), (0, 2, 8, 8), (2, 1, 8, 8)])
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], dyadic: Make) -> None:
    snn = dyadic("chain")
    for call in (snn, snn.run, snn.outputs):
        with pytest.raises(DataError, match=r"\[B, 2, 8, 8\]"):
            call(torch.zeros(shape, dtype=F64))


@ALL
def test_rates_lie_between_0_and_1(name: str, dyadic: Make, dyadic_images: Images) -> None:
    with torch.no_grad():
        run = dyadic(name, 3).run(dyadic_images(name, 4) * 16)
    for site, rate in run.rates.items():
        assert 0 <= rate <= 1
        assert rate == pytest.approx(float(run.spikes[site].sum()) / (3 * run.spikes[site].numel()))
        assert run.spikes[site].max() <= 3
        assert run.spikes[site].min() >= 0


def test_an_unknown_site_is_named(dyadic: Make) -> None:
    with pytest.raises(ConversionError, match="conv1"):
        dyadic("chain").neuron("conv1")


@pytest.mark.parametrize("use", ["call", "summed", "run", "in parts", "answer in parts", "operations", "anatomy", "evaluate"])
def test_images_of_a_size_that_does_not_pass_are_refused_by_their_shape(use: str) -> None:
    """The layers of torch would say that matrices do not fit."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    snn = qs.convert(net, torch.rand(4, 3, 8, 8), steps=2)
    if use == "summed":
        snn = qs.accelerate(qs.quantise(snn.as_synchronous()).network, "count")
    if use == "answer in parts":
        snn.memory = "100MiB"
    images = torch.rand(4, 3, 10, 10)
    uses = {
        "call": lambda: snn(images),
        "summed": lambda: snn(images),
        "run": lambda: snn.run(images),
        "in parts": lambda: simulate(snn, images, memory="100MiB"),
        "answer in parts": lambda: snn(images),
        "operations": lambda: qs.count_operations(snn, images),
        "anatomy": lambda: anatomy_of(snn, images),
        "evaluate": lambda: qs.evaluate(snn, [(images, torch.zeros(4, dtype=torch.long))]),
    }
    with torch.no_grad(), pytest.raises(DataError, match=r"images of shape \[B, 3, 8, 8\] and cannot take \[4, 3, 10, 10\]: .*mat"):
        uses[use]()
