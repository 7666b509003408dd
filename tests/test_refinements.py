"""What every registered refinement must do, and what each of them promises."""

from __future__ import annotations

import copy
import io
import json
import operator

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import quickspike as qs
from quickspike.api import finish, fit
from quickspike.currents import add_current
from quickspike.data import ImageStream
from quickspike.errors import OptionError, UnknownNameError
from quickspike.hub import model_card
from quickspike.lockstep import Correction, Firing, Lockstep, Recorder, channel_means, rebatched
from quickspike.method import Method, label
from quickspike.neuron import Neuron, NeuronParameters, unfold
from quickspike.options import options_of
from quickspike.paper import Paper
from quickspike.refinement import REFINEMENTS, Refinement, refinements_of
from quickspike.refinements.weight_calibration import _Fitting
from quickspike.report import report_tables
from quickspike.searching import Candidate
from quickspike.simulation import simulate

NAMES = sorted(REFINEMENTS.all())
every_refinement = pytest.mark.parametrize("name", NAMES)
CORRECTIONS = [name for name in NAMES if issubclass(REFINEMENTS.get(name), Correction)]
every_correction = pytest.mark.parametrize("name", CORRECTIONS)
both_kinds = pytest.mark.parametrize("synchronous", [False, True], ids=["streaming", "synchronous"])


class Branches(nn.Module):
    """A shared convolution, a shortcut, max-pooling and a product of two signals."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.shared = nn.Conv2d(6, 6, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.gate = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = (x + self.shared(x)).relu()
        x = self.pool(self.shared(x).relu())
        x = x * self.gate(x.mean((2, 3))).clamp(0, 1)[..., None, None]
        x = (x + 0.5 * self.shared(x)).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Branches().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(96, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def balanced(steps: int = 4, **options: object) -> Method:
    return qs.methods.ThresholdBalancing(steps=steps, **options)


def site_errors(network: nn.Module, snn: qs.SpikingNetwork, images: Tensor) -> dict[str, float]:
    """Largest difference of a channel's mean from the source network's, by site."""
    ann = fit(network, ImageStream(images), balanced())
    errors: dict[str, float] = {}

    def visit(name: str, firing: Firing, current: Tensor, wanted: Tensor) -> Tensor:
        errors[name] = float((channel_means(firing.mean(firing.outputs(current))) - wanted).abs().max())
        return current

    Lockstep(snn, ann, channel_means, visit).run(images)
    return errors


# Every refinement


def test_there_are_refinements() -> None:
    assert CORRECTIONS == ["bias_correction", "potential_correction"]
    assert {"offset_shift", "residual_mask"} <= set(NAMES)


@every_refinement
def test_it_tells_its_paper_and_comes_back_from_json(name: str) -> None:
    one = REFINEMENTS.create(name)
    assert isinstance(one.paper, Paper) and one.paper.arxiv
    assert (type(one).__doc__ or "").strip()
    assert Refinement.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert refinements_of([name]) == (one,)


@every_refinement
def test_it_follows_a_method_and_is_kept_with_the_network(name: str, network: nn.Module, images: Tensor, tmp_path) -> None:
    method = balanced() | REFINEMENTS.create(name)
    before = copy.deepcopy(network.state_dict())
    snn = qs.convert(network, images, method)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert Method.from_json(json.loads(json.dumps(snn.method))) == method
    assert label(snn.method) == f"threshold_balancing | {name}"
    snn.save(tmp_path / "snn.safetensors")
    again = qs.load(tmp_path / "snn.safetensors")
    assert torch.equal(again(images), snn(images))
    assert Method.from_json(again.method) == method


@every_correction
@both_kinds
def test_it_brings_the_means_closer(name: str, synchronous: bool, network: nn.Module, images: Tensor) -> None:
    plain = qs.convert(network, images, balanced(3, synchronous=synchronous))
    refined = qs.convert(network, images, balanced(3, synchronous=synchronous) | REFINEMENTS.create(name))
    before, after = site_errors(network, plain, images), site_errors(network, refined, images)
    assert sum(after.values()) < 0.5 * sum(before.values())


@every_correction
@both_kinds
def test_nothing_is_corrected_where_nothing_is_wrong(name: str, synchronous: bool) -> None:
    # Whole numbers of quarter thresholds: four steps give them exactly.
    layer = nn.Linear(4, 4, bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
        layer.bias.zero_()
    network = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 3)).eval()
    values = torch.arange(5).repeat(4)[torch.randperm(20, generator=torch.Generator().manual_seed(0))].reshape(5, 4) / 4
    values[0] = 1
    method = balanced(4, ceiling="percentile", percentile=100.0, synchronous=synchronous)
    plain, refined = qs.convert(network, values, method), qs.convert(network, values, method | REFINEMENTS.create(name))
    for key, value in refined.state_dict().items():
        assert torch.allclose(value, plain.state_dict()[key], atol=1e-6), key


# Composing


def test_what_is_no_refinement_is_refused() -> None:
    with pytest.raises(OptionError, match="refinements must be"):
        balanced(refinements=("bias_correction",))
    with pytest.raises(TypeError):
        operator.or_(balanced(), "bias_correction")
    with pytest.raises(OptionError, match="refinements must be a tuple"):
        qs.methods.QCFS(refinements=[qs.refinements.BiasCorrection()])
    with pytest.raises(UnknownNameError, match="bias_correction"):
        refinements_of(["bias_corection"])
    with pytest.raises(OptionError, match="no option"):
        refinements_of(["bias_correction:pases=2"])
    with pytest.raises(OptionError, match="bias_correction: passes must be"):
        refinements_of(["bias_correction:passes=0"])


def test_they_apply_in_order_and_say_so() -> None:
    one, other = refinements_of(["bias_correction:passes=3,readout=false", "potential_correction"])
    assert {name: getattr(one, name) for name in options_of(one)} == {
        "images": 1024,
        "batch": 64,
        "passes": 3,
        "rate": 1.0,
        "readout": False,
    }
    method = balanced() | one | other
    assert method.refinements == (one, other)
    assert label(method.to_json()) == "threshold_balancing | bias_correction:passes=3,readout=False | potential_correction"
    assert "refinements" not in balanced().to_json()


# Lockstep


@both_kinds
def test_lockstep_gives_what_the_network_gives(synchronous: bool, network: nn.Module, images: Tensor) -> None:
    method = balanced(5, synchronous=synchronous)
    snn, ann = qs.convert(network, images, method), fit(network, ImageStream(images), method)
    means: dict[str, Tensor] = {}

    def visit(name: str, firing: Firing, current: Tensor, wanted: Tensor) -> Tensor:
        means[name] = firing.mean(firing.outputs(current))
        return current

    both = Lockstep(snn, ann, channel_means, visit)
    assert both.windows is synchronous
    wanted, given = both.run(images)
    assert torch.equal(wanted, ann.module(images))
    assert torch.allclose(given, snn(images), atol=1e-5)
    run = simulate(snn, images)
    for site, neuron in snn.neurons().items():
        heights = neuron.height(neuron.threshold)
        assert torch.allclose(means[site], run.spikes[site] * heights / 5, atol=1e-5), site


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_mean_output_is_the_mean_of_the_outputs(compiled: bool, scaled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    theta = torch.rand(3, 1, 1, generator=generator) + 0.5
    parameters = NeuronParameters(theta, 0.4, 0.9, torch.rand(3, 1, 1, generator=generator) + 0.5, scaled)
    neuron = Neuron(parameters, 7, constant_input=True)
    neuron.compiled = compiled
    current = torch.randn(4, 3, 5, 5, generator=generator)
    with torch.no_grad():
        assert torch.allclose(neuron.mean_output(current), unfold(neuron(current), 7).mean(0), atol=1e-6)


@both_kinds
def test_lockstep_where_pools_look_at_single_spikes(synchronous: bool, images: Tensor) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3))
    network = nn.Sequential(*layers).eval()
    method = qs.methods.UltraLowLatency(steps=4, pool="spikes", synchronous=synchronous)
    stream = ImageStream(images)
    ann = fit(network, stream, method)
    snn = finish(ann, stream, method)
    assert any(type(layer) is nn.MaxPool2d for layer in snn.network.modules())
    _, given = Lockstep(snn, ann, channel_means, lambda name, firing, current, wanted: current).run(images)
    assert torch.allclose(given, snn(images), atol=1e-5)


def test_signed_neurons_that_start_above_theta_take_spikes_back() -> None:
    current = torch.linspace(-1, 1.5, 200).reshape(4, 1, 5, 10)
    neuron = Neuron(NeuronParameters(torch.tensor(1.0), 2.0, signed=True), 4, constant_input=True)
    with torch.no_grad():
        assert torch.allclose(neuron.mean_output(current), unfold(neuron(current), 4).mean(0), atol=1e-6)


def test_batches_have_the_size_that_is_asked_for(network: nn.Module, images: Tensor) -> None:
    snn, ann = qs.convert(network, images, balanced()), fit(network, ImageStream(images), balanced())
    sizes: list[int] = []

    def visit(name: str, firing: Firing, current: Tensor, wanted: Tensor) -> Tensor:
        if name == snn.sites[0].name:
            sizes.append(len(current))
        return current

    both = Lockstep(snn, ann, channel_means, visit)
    list(both.over(ImageStream(list(torch.split(images, 7))), 50, 20))
    assert sizes == [20, 20, 10]
    assert [len(batch) for batch in rebatched([images[:5], images[:96]], 32)] == [32, 32, 32, 5]


def test_large_inputs_come_in_smaller_batches(network: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quickspike.lockstep.MOST_VALUES", 10 * 4 * images[0].numel())
    snn, ann = qs.convert(network, images, balanced()), fit(network, ImageStream(images), balanced())
    both = Lockstep(snn, ann, channel_means, lambda name, firing, current, wanted: current)
    assert [len(given[""]) for _, given in both.over(ImageStream(images), 25, 20)] == [10, 10, 5]
    # Of the last batch.
    assert both.share == 5 / 20
    assert [len(given[""]) for _, given in both.over(ImageStream(images), 8, 20)] == [8]
    assert both.share == 1


@every_correction
def test_smaller_batches_correct_less(name: str, network: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what comes out is nearly the same, and not what the last few images alone would have."""
    images = images * torch.linspace(0.1, 3, len(images)).view(-1, 1, 1, 1)
    method = balanced(2) | REFINEMENTS.create(name, passes=4, batch=96)

    def refined() -> Tensor:
        return torch.cat([value.flatten() for value in qs.convert(network, images, method).state_dict().values()])

    whole = refined()
    monkeypatch.setattr("quickspike.lockstep.MOST_VALUES", 4 * 2 * images[0].numel())
    small = (refined() - whole).norm()
    monkeypatch.setattr(Lockstep, "share", property(lambda self: 1.0, lambda self, value: None), raising=False)
    assert small < 0.5 * (refined() - whole).norm()


# Where they come from


@every_refinement
def test_images_of_a_generator_serve_again(name: str, network: nn.Module, images: Tensor) -> None:
    method = balanced() | REFINEMENTS.create(name)
    once = qs.convert(network, (batch for batch in torch.split(images, 32)), method)
    assert torch.equal(once(images), qs.convert(network, list(torch.split(images, 32)), method)(images))


def test_a_refinement_that_is_not_known_here_is_named_as_it_is(network: nn.Module, images: Tensor) -> None:
    snn = qs.convert(network, images, balanced())
    snn.method["refinements"] = [{"name": "foreign", "options": {}}, {"name": "bias_correction", "options": {"new": 1}}, {"name": "bare"}]
    assert label(snn.method) == "threshold_balancing | foreign | bias_correction | bare"
    report = qs.evaluate(snn, [(images, torch.zeros(len(images), dtype=torch.long))], device="cpu")
    shown = io.StringIO()
    Console(width=200, file=shown).print(report_tables(report))
    assert "foreign" in shown.getvalue()


def test_a_search_tries_refined_candidates(network: nn.Module, images: Tensor) -> None:
    refined = Candidate("threshold_balancing", {"refinements": (qs.refinements.BiasCorrection(passes=3),)})
    assert str(refined) == "threshold_balancing | bias_correction:passes=3"
    labels = network(images).argmax(1)
    found = qs.search(
        network, images, [(images, labels)], [Candidate("threshold_balancing"), refined], max_drop=100, most_steps=2, device="cpu"
    )
    assert {trial.candidate for trial in found.trials} == {"threshold_balancing", str(refined)}


def test_the_card_cites_the_refinement_too(network: nn.Module, images: Tensor) -> None:
    card = model_card(qs.convert(network, images, balanced() | qs.refinements.BiasCorrection()), None)
    assert "2409.03368" in str(card)
    assert "2106.06984" in str(card)
    assert "with the method `threshold_balancing`, refined by `bias_correction`, of quickspike" in str(card)


# Bias correction


def test_bias_correction_brings_the_readout_to_the_source_networks_mean(network: nn.Module, images: Tensor) -> None:
    snn = qs.convert(network, images, balanced(2) | qs.refinements.BiasCorrection(passes=8, batch=96))
    away = (snn(images) - network(images)).mean(0).abs().max()
    plain = (qs.convert(network, images, balanced(2))(images) - network(images)).mean(0).abs().max()
    assert away < 0.05 * plain
    left = qs.convert(network, images, balanced(2) | qs.refinements.BiasCorrection(passes=8, batch=96, readout=False))
    assert torch.equal(left.network.head.bias, network.head.bias)


def test_a_bias_goes_where_it_reaches_these_neurons_alone(network: nn.Module, images: Tensor) -> None:
    snn = qs.convert(network, images, balanced() | qs.refinements.BiasCorrection())
    assert not torch.equal(snn.network.first.bias, network.first.bias)
    # Three calls share it.
    assert torch.equal(snn.network.shared.bias, network.shared.bias)
    assert [name for name, _ in snn.network.named_children() if name.startswith("current")] == ["current", "current_2", "current_3"]


def test_a_current_added_in_front_of_one_reader_does_not_reach_another() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return torch.cat([x.relu(), (2 * x).relu()], 1)

    module = torch.fx.symbolic_trace(Two())
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    before = module(x)
    node = next(node for node in module.graph.nodes if node.target == "layer")
    reader = next(user for user in node.users if user.target == "relu")
    add_current(module, node, reader, torch.tensor([10.0, 20.0, 30.0]), 1)
    module.recompile()
    after = module(x)
    assert torch.allclose(after[:, :3], (module.layer(x) + torch.tensor([10.0, 20.0, 30.0])).relu())
    assert torch.equal(after[:, 3:], before[:, 3:])


def test_a_signal_that_is_added_to_itself_gets_its_current_once() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return x + x

    module = torch.fx.symbolic_trace(Doubled())
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    before = module(x)
    output = next(node for node in module.graph.nodes if node.op == "output")
    add_current(module, output.all_input_nodes[0], output, torch.tensor([1.0, 2.0, 3.0]), 1)
    module.recompile()
    assert torch.allclose(module(x) - before, torch.tensor([1.0, 2.0, 3.0]).expand(5, 3), atol=1e-6)


def test_an_output_without_channels_keeps_its_mean_and_says_so(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    class Value(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(1)

    torch.manual_seed(0)
    snn = qs.convert(Value().eval(), images, balanced() | qs.refinements.BiasCorrection())
    assert snn(images).shape == (len(images),)
    assert caplog.text.count("the output has no channels, and keeps its mean") == 1


@pytest.mark.parametrize("engine", ["fused", "integer", "count"])
def test_a_corrected_network_runs_on_every_engine(engine: str, images: Tensor) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)
    ).eval()
    snn = qs.convert(plain, images, balanced(4, synchronous=engine == "count") | qs.refinements.BiasCorrection())
    whole = snn if engine == "fused" else qs.quantise(snn).network
    fast = qs.accelerate(whole, engine)
    reference = qs.accelerate(whole, "reference")
    assert torch.allclose(fast(images), reference(images), atol=1e-5)
    assert all(torch.equal(count, simulate(reference, images).spikes[site]) for site, count in simulate(fast, images).spikes.items())


# Potential correction


@pytest.mark.parametrize("granularity", ["neuron", "channel"])
def test_potentials_are_per_neuron_or_per_channel(granularity: str, network: nn.Module, images: Tensor) -> None:
    snn = qs.convert(network, images, balanced() | qs.refinements.PotentialCorrection(granularity=granularity))
    for site in snn.sites:
        shape = site.shape if granularity == "neuron" else (site.shape[0], *(1,) * (len(site.shape) - 1))
        assert snn.neuron(site.name).initial.shape == shape


# Weight calibration


@both_kinds
@pytest.mark.parametrize("reach", ["layer", "network"])
def test_weights_are_fitted_to_the_activations(
    reach: str, synchronous: bool, digits_source: nn.Module, digits_calibration: Tensor, digits_test: tuple[Tensor, Tensor]
) -> None:
    """The readout of images that were not seen is nearer to the source network's by 0.4 or more."""
    method = balanced(2, synchronous=synchronous)
    plain = qs.convert(digits_source, digits_calibration, method)
    refined = qs.convert(digits_source, digits_calibration, method | qs.refinements.WeightCalibration(iterations=60, reach=reach))
    with torch.no_grad():
        off = [float((snn(digits_test[0]) - digits_source(digits_test[0])).square().mean()) for snn in (plain, refined)]
    assert off[1] < 0.65 * off[0]


def test_a_layers_loss_moves_its_own_weights_alone(images: Tensor) -> None:
    """With the readout left out of it, the last layer of three must not move the first: its gradient ends at the spikes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    snn, ann = qs.convert(net, images, balanced()), fit(net, ImageStream(images), balanced())
    for apart, moved in ((True, False), (False, True)):
        with torch.no_grad():
            recorder = Recorder(ann, lambda values: values)
            recorder.run(images)
        wanted = {name: value + (1.0 if name == "4" else 0.0) for name, value in recorder.found.items()}
        fitting = _Fitting(snn, wanted, apart)
        fitting.run(images)
        weight = snn.network.get_submodule("1").weight
        (gradient,) = torch.autograd.grad(fitting.distances["4"], weight, allow_unused=True)
        assert (gradient is not None and bool(gradient.ne(0).any())) == moved


def test_where_layers_wait_weights_are_calibrated_on_means(network: nn.Module, images: Tensor) -> None:
    ann = fit(network, ImageStream(images), balanced(5, synchronous=True))
    snn = finish(ann, ImageStream(images), balanced(5, synchronous=True))
    with torch.no_grad():
        recorder = Recorder(ann, lambda values: values)
        recorder.run(images)
    weights = qs.refinements.WeightCalibration()
    assert weights._by_means(snn)
    out = _Fitting(snn, recorder.found, False, True).run(images)
    assert torch.allclose(out, snn(images), atol=1e-5)
    streaming = finish(ann, ImageStream(images), balanced(5))
    assert not weights._by_means(streaming)
    assert qs.refinements.WeightCalibration(by="means")._by_means(streaming)
    for network in (snn, streaming):
        next(neuron for neuron in network.neurons().values() if not neuron.constant_input).leak.fill_(0.9)
        assert not qs.refinements.WeightCalibration(by="means")._by_means(network)
    with pytest.raises(OptionError, match="without leak"):
        qs.refinements.WeightCalibration(by="means").refine(streaming, ann, ImageStream(images))


def test_means_calibrate_streaming_neurons_as_if_they_waited(network: nn.Module, images: Tensor) -> None:
    weights = qs.refinements.WeightCalibration(by="means", iterations=3)
    streaming = qs.convert(network, images, balanced(5, signed=True) | weights)
    waiting = qs.convert(network, images, balanced(5, synchronous=True) | weights)
    assert streaming.latency == 5
    layers = [name for name, _ in streaming.network.named_parameters() if name.endswith(("weight", "bias"))]
    assert layers
    for name in layers:
        assert torch.allclose(streaming.network.get_parameter(name), waiting.network.get_parameter(name), atol=1e-6), name


def test_the_gradient_of_a_mean_output_is_that_of_a_slope() -> None:
    parameters = NeuronParameters(torch.tensor([2.0, 4.0]), initial=0.5, amplitude=1.5, averaged=True)
    neuron = Neuron(parameters, 4, True)
    current = torch.tensor([[-0.1, 0.0], [1.0, 4.0], [2.0, 4.1], [2.1, 3.0]], requires_grad=True)
    out = neuron.mean_output(current)
    assert torch.equal(out, neuron.mean_output(current.detach()))
    weights = torch.arange(1.0, 9.0).view(4, 2)
    (out * weights).sum().backward()
    inside = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert torch.equal(current.grad, 1.5 * weights * inside)


def test_weights_are_calibrated_where_they_can_be(network: nn.Module, images: Tensor) -> None:
    weights = qs.refinements.WeightCalibration(iterations=2)
    with pytest.raises(OptionError, match="in front of it"):
        qs.convert(network, images, balanced(8) | qs.refinements.ResidualMask() | weights)
    with torch.inference_mode(), pytest.raises(OptionError, match="outside torch"):
        qs.convert(network, images, balanced() | weights)
    with pytest.raises(OptionError, match="half precision"):
        qs.convert(copy.deepcopy(network).half(), images.half(), balanced() | weights)
    snn = qs.convert(network, images, balanced() | weights)
    assert not any(parameter.grad is not None for parameter in snn.parameters())
    assert snn.network.head.weight.requires_grad


def test_steps_that_are_too_large_are_taken_back(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    """All inputs are positive and no norm follows, so that a step on every weight is a large one on every current."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    positive = 100 * images.abs()
    weights = {"reach": "network", "iterations": 40, "images": 96}

    def error(snn: qs.SpikingNetwork) -> float:
        with torch.no_grad():
            return float((snn(positive) - net(positive)).square().mean())

    method = balanced(4, synchronous=True)
    given = error(qs.convert(net, positive, method))
    with caplog.at_level("WARNING"):
        snn = qs.convert(net, positive, method | qs.refinements.WeightCalibration(learning_rate=0.1, **weights))
    assert "starts again with learning_rate=0.01" in caplog.text
    assert error(snn) < given
    # What starts again ends where the smaller rate would have ended.
    rate = float(caplog.text.strip().rpartition("learning_rate=")[2])
    direct = qs.convert(net, positive, method | qs.refinements.WeightCalibration(learning_rate=rate, **weights))
    assert all(torch.equal(one, other) for one, other in zip(snn.state_dict().values(), direct.state_dict().values(), strict=True))


def test_the_learning_rate_of_weights_rises_and_falls(images: Tensor) -> None:
    plain, warm = (qs.refinements.WeightCalibration(iterations=20, warmup=share) for share in (0.0, 0.25))
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 20)
    for step in range(20):
        wanted = cosine.get_last_lr()[0]
        assert plain._share(step) == pytest.approx(wanted)
        assert warm._share(step) == pytest.approx(min(1, (step + 1) / 5) * wanted)
        optimiser.step()
        cosine.step()
    # The first step of Adam is as long as the learning rate.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    options = {"iterations": 2, "learning_rate": 1e-5}
    ends = [qs.convert(net, images, balanced(4) | qs.refinements.WeightCalibration(warmup=share, **options)) for share in (0.0, 1.0)]
    moved = [float((end.network.get_parameter("1.weight") - net[1].weight).detach().abs().max()) for end in ends]
    assert 0 < moved[1] < 0.8 * moved[0]


def test_weights_that_no_rate_improves_are_left_as_they_were(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quickspike.refinements.weight_calibration.RISEN", 0.0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    with pytest.raises(OptionError, match="and with all below it"):
        qs.convert(net, images, balanced(4) | qs.refinements.WeightCalibration(iterations=2))


def test_a_layer_that_is_silent_on_a_batch_does_not_drown_the_others(images: Tensor) -> None:
    """Divided by nothing, one stray spike would fill what Adam remembers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    snn = qs.convert(net, images, balanced())
    fitting = _Fitting(snn, {"2": torch.zeros(96, 12)}, True)
    fitting.run(images)
    assert 1 < float(fitting.distances["2"].detach()) < 2000
