"""A readout that forgets early steps: its numbers against their definition, everywhere that networks go."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quickspike as qs
from conversions import NAMES, Images, Networks
from quickspike import choosing, nir_programs
from quickspike.anatomy import anatomy_of
from quickspike.api import fit
from quickspike.choosing import Auto, choose
from quickspike.cli import main
from quickspike.data import ImageStream
from quickspike.early_exit import Exit, leads_of
from quickspike.errors import CheckpointError, ConversionError, OptionError
from quickspike.hub import model_card
from quickspike.method import Method
from quickspike.nir_export import to_nir
from quickspike.nir_programs import compare
from quickspike.nir_readers import play
from quickspike.piecewise import PIECES
from quickspike.readouts import LeakyReadout as Layer
from quickspike.readouts import answers, leak_of
from quickspike.refinement import refinements_of
from quickspike.refinements import BiasCorrection, LeakyReadout, OffsetShift, ResidualMask, WeightCalibration
from quickspike.refinements.leaky_readout import LEAKS, _Distances
from quickspike.searching import _likeness
from quickspike.simulation import simulate

STEPS, LEAK = 6, 0.7


def faded(outputs: Tensor, leak: float = LEAK) -> Tensor:
    """The definition: after t steps the mean of the outputs, that of step s weighted by leak^(t-s). `[T, ...]`."""
    found = []
    for step in range(len(outputs)):
        weights = torch.tensor([leak ** (step - one) for one in range(step + 1)], dtype=torch.float64)
        found.append(torch.tensordot(weights / weights.sum(), outputs[: step + 1].double(), dims=1))
    return torch.stack(found).to(outputs.dtype)


def method(*refinements: qs.refinement.Refinement, steps: int = STEPS, **options: Any) -> Method:
    found: Method = qs.methods.ThresholdBalancing(steps=steps, **options)
    for one in refinements:
        found = found | one
    return found


Pair = tuple[qs.SpikingNetwork, qs.SpikingNetwork, Tensor]
Pairs = Callable[..., Pair]


@pytest.fixture(scope="module")
def pair(random_network: Networks, random_images: Images) -> Pairs:
    """(without, with a leak, images), made once."""
    made: dict[Any, Pair] = {}

    def get_one(name: str = "chain", leak: float = LEAK) -> Pair:
        if (name, leak) not in made:
            network, images = random_network(name), random_images(name, 16, seed=1)
            plain, leaky = (qs.convert(network, images, method(*some)) for some in ((), (LeakyReadout(leak=leak),)))
            made[name, leak] = (plain, leaky, random_images(name, 9, seed=2))
        return made[name, leak]

    return get_one


def singles(pair: Pairs, name: str = "chain") -> Pair:
    """The same in single precision, in which programs are exported."""
    plain, leaky, images = copy.deepcopy(pair(name))
    return plain.float(), leaky.float(), images.float()


# The layer


@pytest.mark.parametrize("leak", [0.01, 0.5, 0.7, 0.999])
@pytest.mark.parametrize("parts", [(6,), (1,) * 6, (2, 4), (3, 3)])
def test_the_mean_so_far_is_that_in_which_old_steps_fade(leak: float, parts: tuple[int, ...]) -> None:
    x, state, found = torch.randn(6, 5), None, []
    layer = Layer(6, leak)
    for part, steps in zip(torch.split(x, parts), parts, strict=True):
        out, state = layer.scan(part, state, steps)
        found.append(out)
    so_far = torch.cat(found).cumsum(0) / torch.arange(1, 7)[:, None]
    torch.testing.assert_close(so_far, faded(x, leak))
    torch.testing.assert_close(answers(x, leak), faded(x, leak))


def test_constant_outputs_are_answered_as_they_are() -> None:
    x = torch.randn(1, 7).expand(5, 7)
    torch.testing.assert_close(answers(x, LEAK), x)


def test_it_is_a_leaky_integrator() -> None:
    """In units of what a constant input of 1 brings its potential to."""
    x, potential, of_ones = torch.randn(8, 3), torch.zeros(3), 0.0
    for one in x:
        potential, of_ones = LEAK * potential + one, LEAK * of_ones + 1
    torch.testing.assert_close(answers(x, LEAK)[-1], potential / of_ones)


def test_half_precision_adds_up_in_single() -> None:
    """Of 300 outputs of 1 the mean is 1; sums in bfloat16 would end at 256."""
    found = Layer(300, 0.999)(torch.ones(300, 2, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float().mean(0), torch.ones(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("leak", [0.0, 1.0, -0.5, 2.0, float("nan"), 1, "0.5", None, True])
def test_a_leak_lies_between_0_and_1(leak: Any) -> None:
    with pytest.raises(ConversionError, match="lies between 0 and 1"):
        Layer(4, leak)


# Networks


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_the_definition(name: str, pair: Pairs) -> None:
    plain, leaky, images = pair(name)
    assert (plain.readout_leak, leaky.readout_leak) == (None, LEAK)
    wanted = faded(plain.outputs(images))
    assert not torch.allclose(wanted[-1], plain(images), atol=1e-3)
    torch.testing.assert_close(leaky(images), wanted[-1])
    for run in (leaky.run(images), simulate(leaky, images, step_by_step=True), simulate(leaky, images, memory="1MiB")):
        torch.testing.assert_close(run.logits, wanted)
    for site, counts in plain.run(images).spikes.items():
        assert torch.equal(leaky.run(images).spikes[site], counts)
    assert leaky.latency == plain.latency
    for steps in (1, 2, 9):
        torch.testing.assert_close(leaky.with_steps(steps)(images), faded(plain.with_steps(steps).outputs(images))[-1])


@pytest.mark.parametrize("name", NAMES)
def test_it_is_kept_in_a_file(name: str, pair: Pairs, tmp_path: Path) -> None:
    _, leaky, images = pair(name)
    leaky.save(tmp_path / "snn.safetensors")
    again = qs.load(tmp_path / "snn.safetensors")
    assert again.readout_leak == LEAK
    assert torch.equal(again(images), leaky(images))


def test_a_file_of_many_steps_is_checked_without_running_them(pair: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair()[1].with_steps(97).save(tmp_path / "snn.safetensors")
    monkeypatch.setattr(Layer, "scan", lambda *_: pytest.fail("a step was run"))
    assert qs.load(tmp_path / "snn.safetensors").steps == 97


@pytest.mark.parametrize("leak", ["2.0", "0.0", '"0.7"', "null", "1e400"])
def test_a_file_with_another_leak_is_refused(leak: str, pair: Pairs, tmp_path: Path) -> None:
    from quickspike import checkpoint

    _, leaky, _ = pair()
    described = json.loads(json.dumps(checkpoint._layer_to_json(leaky.network.leaky_readout)))
    assert described == {"type": "LeakyReadout", "arguments": {"leak": LEAK}}
    described["arguments"]["leak"] = json.loads(leak)
    with pytest.raises((CheckpointError, ConversionError)):
        checkpoint._layer_from_json(described, {}, STEPS, "readout")


def test_samples_stop_early(pair: Pairs) -> None:
    plain, leaky, images = pair()
    wanted = faded(plain.outputs(images))
    limit = float(leads_of(wanted.detach()).median())
    run = leaky.run(images, exit=Exit((limit,) * (STEPS - 1), 1.0, 0.0))
    assert run.stopped is not None and len(set(run.stopped.tolist())) > 1
    for sample, stopped in enumerate(run.stopped.tolist()):
        torch.testing.assert_close(run.logits[-1, sample], wanted[stopped - 1, sample])


def test_it_learns(pair: Pairs) -> None:
    """Gradients are those of the definition."""
    plain, leaky, images = pair()
    found = []
    for snn, answer in ((plain, lambda snn: faded(snn.outputs(images))[-1]), (leaky, lambda snn: snn(images))):
        parameters = [one for one in snn.parameters() if one.requires_grad]
        found.append(torch.autograd.grad(answer(snn).square().sum(), parameters))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_folded_and_in_whole_numbers(name: str, pair: Pairs) -> None:
    plain, leaky, images = pair(name)
    torch.testing.assert_close(leaky.fold()(images), leaky(images), atol=1e-4, rtol=1e-4)
    whole, plain_whole = qs.quantise(leaky, image_bits=8).network, qs.quantise(plain, image_bits=8).network
    torch.testing.assert_close(whole(images), faded(plain_whole.outputs(images))[-1])
    fast = qs.accelerate(whole, "integer")
    torch.testing.assert_close(fast(images), whole(images))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_fused_engine_reads_out_alike(precision: Any, pair: Pairs) -> None:
    plain, leaky, images = singles(pair)
    found, bare = (qs.accelerate(snn, "fused", precision=precision) for snn in (leaky, plain))
    with torch.no_grad():
        tolerance = 1e-5 if precision == "fp32" else 0.02
        torch.testing.assert_close(found(images), faded(bare.outputs(images))[-1], atol=tolerance, rtol=tolerance)


def test_nir_files_keep_it(pair: Pairs, tmp_path: Path) -> None:
    pytest.importorskip("nir")
    plain, leaky, images = singles(pair)
    exported = qs.export_nir(leaky, tmp_path / "net.nir")
    again = qs.load_nir(tmp_path / "net.nir")
    assert again.readout_leak == LEAK
    torch.testing.assert_close(again(images), leaky(images), atol=1e-4, rtol=1e-4)
    said = json.loads(exported.graph.metadata["quickspike"])
    assert said["readout_leak"] == LEAK and "leak^(T-s)" in said["readout"]
    played = play(exported.graph, images, STEPS)
    torch.testing.assert_close(played.logits, faded(played.outputs))
    labels = torch.zeros(len(images), dtype=torch.long)
    for reader in ("nir", "sinabs"):
        written = to_nir(leaky, reader, initial="bias")
        bare = play(written.graph, images, STEPS, reader).outputs
        agreement = compare(leaky, written, [(images, labels)])
        same = (faded(bare)[-1].argmax(1) == leaky(images).argmax(1)).float().mean()
        assert agreement.agreement == pytest.approx(100 * float(same))
    other = json.loads(to_nir(plain).graph.metadata["quickspike"])
    # Readers that know of no leak refuse the file, and read the others as before.
    assert "readout_leak" not in other and (said["format"], other["format"]) == (2, 1)
    exported.graph.metadata["quickspike"] = "[]"
    with pytest.raises(ConversionError, match=r"metadata .* are damaged"):
        play(exported.graph, images, STEPS)


def test_outputs_of_a_program_are_weighed(pair: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program whose first output speaks for another class, three times as loudly as the last one for the network's."""
    pytest.importorskip("nir")
    plain, leaky, images = singles(pair)
    for snn, agreement in ((leaky, 100), (plain, 0)):
        ours = snn(images).argmax(1)
        outputs = torch.zeros(STEPS, len(images), plain(images).shape[1])
        outputs[0, range(len(images)), (ours + 1) % outputs.shape[2]] = 3
        outputs[-1, range(len(images)), ours] = 1
        monkeypatch.setattr(nir_programs, "run_in", lambda reader, graph, batch, steps, outputs=outputs: outputs)
        assert compare(snn, to_nir(snn), [(images, ours)], program=True).agreement == agreement


def test_whoever_exports_is_told_how_to_read_out(pair: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nir")
    plain, leaky, _ = singles(pair)
    for snn, said in ((leaky, True), (plain, False)):
        snn.save(tmp_path / "net.safetensors")
        main(["export", str(tmp_path / "net.safetensors"), "--to", "nir", "--out", str(tmp_path / "net.nir")])
        assert ("that of step t of 6 weighted by 0.7^(6-t)" in capsys.readouterr().out) == said


def test_whoever_converts_is_told_the_leak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--data", "digits", "--calibration-images", "20", "--steps", "3", "--out", str(tmp_path / "net.safetensors")]
    for refinement, said in (("leaky_readout:leak=0.25", True), ("bias_correction", False)):
        main(["convert", "digits_cnn", *where, "--refine", refinement])
        assert ("readout: 0.25 of the weight" in capsys.readouterr().out) == said


@pytest.mark.parametrize("form", ["unrolled", "step"])
def test_onnx_files_compute_it(form: Any, pair: Pairs, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    from quickspike.onnx_export import initial_states

    _, leaky, images = singles(pair, "residual")
    qs.to_onnx(leaky, tmp_path / "net.onnx", form)
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    names = [output.name for output in session.get_outputs()]
    if form == "unrolled":
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        torch.testing.assert_close(found, leaky(images).detach(), atol=1e-5, rtol=1e-4)
        return
    states, wanted, total = initial_states(tmp_path / "net.onnx", len(images)), leaky.run(images).logits.detach(), torch.zeros(())
    for step in range(STEPS):
        out = dict(zip(names, session.run(names, {"images": images.numpy(), **states}), strict=True))
        states = {name: out[f"{name}.next"] for name in states}
        total = total + torch.from_numpy(out["logits"])
        torch.testing.assert_close(total / (step + 1), wanted[step], atol=1e-5, rtol=1e-4)


def test_programs_compute_it(pair: Pairs, tmp_path: Path) -> None:
    _, leaky, images = singles(pair, "pooled")
    qs.to_program(leaky, tmp_path / "net.pt2")
    found = torch.export.load(tmp_path / "net.pt2").module()(images)
    torch.testing.assert_close(found, leaky(images), atol=1e-5, rtol=1e-4)


def test_what_has_no_early_steps_refuses_it(pair: Pairs, random_network: Networks, random_images: Images) -> None:
    _, leaky, _ = pair()
    for use in (leaky.as_synchronous, leaky.as_weighted):
        with pytest.raises(OptionError, match="convert without leaky_readout"):
            use()
    assert leaky.as_signed().readout_leak == leaky.as_groups(2).readout_leak == LEAK
    network, images = random_network("chain"), random_images("chain", 8, seed=1)
    for options in ({"synchronous": True}, {"weighted": True}):
        with pytest.raises(OptionError, match=r"leaky_readout: .* waits for whole windows"):
            qs.convert(network, images, method(LeakyReadout(), **options))
    single = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(OptionError, match=r"leaky_readout: .* waits for whole windows"):
        # No layer in front, but what the spikes weigh is their order.
        qs.convert(single, torch.randn(8, 3), method(LeakyReadout(), weighted=True))
    for refinements, reason in (
        ((LeakyReadout(leak=0.5), LeakyReadout()), "leaks already, by 0.5"),
        ((ResidualMask(tau=2), LeakyReadout()), "take one of the two"),
        ((LeakyReadout(leak=0.5), ResidualMask(tau=2)), r"residual_mask, .* no place for a readout that leaks"),
        ((LeakyReadout(leak=0.5), WeightCalibration(by="means")), "no place for a readout that leaks"),
    ):
        with pytest.raises(OptionError, match=reason):
            qs.convert(network, images, method(*refinements))
    alone = qs.convert(single, torch.randn(8, 3), method(LeakyReadout(leak=0.5)))
    with pytest.raises(OptionError, match="the count engine has no place"):
        qs.accelerate(qs.quantise(alone).network, "count")


def test_cards_searches_and_counts_tell_of_it(pair: Pairs) -> None:
    plain, leaky, images = pair()
    assert "weighted by 0.7^(t-s)" in str(model_card(leaky, None))
    assert "weighted by" not in str(model_card(plain, None))
    assert len({_likeness(one) for one in (plain, leaky, pair("chain", 0.5)[1])}) == 3
    rows = {row.name: row for row in qs.count_operations(leaky, images).rows}
    assert rows["leaky_readout"].multiplies == STEPS * plain(images[:1]).numel()
    own, bare = (
        {row.name: row.accumulates for row in qs.count_operations(snn, images).rows if row.name != "leaky_readout"}
        for snn in (leaky, plain)
    )
    assert own == bare


def test_layers_are_taken_apart_as_without(pair: Pairs) -> None:
    plain, leaky, images = pair("residual")
    for one, other in zip(anatomy_of(leaky, images).sites, anatomy_of(plain, images).sites, strict=True):
        assert one == other


# The choice


@pytest.fixture(scope="module")
def deep() -> nn.Module:
    """Eight layers with random weights; from potentials of 0 spikes need steps to come through."""
    torch.manual_seed(0)
    layers = [part for _ in range(8) for part in (nn.Linear(64, 64), nn.ReLU())]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10)).eval()


def test_of_distances_up_to_a_factor() -> None:
    """Against the definition: the least squared distance that any factor leaves."""
    generator = torch.Generator().manual_seed(0)
    outputs, wanted = torch.randn(3, 40, 5, generator=generator), torch.randn(40, 5, generator=generator)
    outputs[0] = 3 * wanted
    weights = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.2, 0.3, 0.5], [-1, 0, 0], [0, 0, 0]], dtype=torch.float64)
    distances = _Distances(3)
    for half in (slice(0, 15), slice(15, 40)):
        distances.add(outputs[:, half], wanted[half])
    found = distances.of(weights)
    assert float(found[0]) == pytest.approx(0, abs=1e-12)
    for one, mean in zip(found[1:3], torch.tensordot(weights[1:3], outputs.double(), dims=1), strict=True):
        factor = max(0.0, float((mean * wanted).sum() / mean.square().sum()))
        assert float(one) == pytest.approx(float((factor * mean - wanted).square().sum() / wanted.double().square().sum()))
    assert found[3:].tolist() == [1, 1]


@pytest.mark.parametrize("steps", [8, 12])
def test_the_leak_that_comes_closest_is_taken(steps: int, deep: nn.Module, digits_calibration: Tensor) -> None:
    plain = qs.convert(deep, digits_calibration, method(steps=steps, initial=0.0))
    leaky = qs.convert(deep, digits_calibration, method(LeakyReadout(), steps=steps, initial=0.0))
    with torch.no_grad():
        wanted, outputs = deep(digits_calibration), plain.outputs(digits_calibration)

    def distance(leak: float) -> float:
        answer = faded(outputs, leak)[-1].double()
        return 1 - float((answer * wanted).sum() ** 2 / (answer.square().sum() * wanted.double().square().sum()))

    best = min(LEAKS, key=distance)
    assert leaky.readout_leak == leaky.provenance["readout_leak"] == best < 1
    assert distance(best) < 0.95 * distance(1.0)


def test_where_early_steps_are_right_nothing_leaks() -> None:
    """Whole numbers of a quarter of theta, and even currents: 4 steps answer exactly, and only all of them."""
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
    network = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 3)).eval()
    values = torch.arange(5).repeat(4)[torch.randperm(20, generator=torch.Generator().manual_seed(0))].reshape(5, 4) / 4
    values[0] = 1
    snn = qs.convert(network, values, method(LeakyReadout(), steps=4, ceiling="percentile", percentile=100.0))
    assert snn.readout_leak is None
    assert leak_of(snn.network) is None


def test_one_step_has_none_before_it(random_network: Networks, random_images: Images, caplog: pytest.LogCaptureFixture) -> None:
    snn = qs.convert(random_network("chain"), random_images("chain", 8, seed=1), method(LeakyReadout(), steps=1))
    assert snn.readout_leak is None
    assert "one step has none before it" in caplog.text


def test_a_leak_of_1_is_none(random_network: Networks, random_images: Images) -> None:
    snn = qs.convert(random_network("chain"), random_images("chain", 8, seed=1), method(LeakyReadout(leak=1.0)))
    assert snn.readout_leak is None
    assert refinements_of(["leaky_readout:leak=0.25"]) == (LeakyReadout(leak=0.25),)


def test_it_brings_a_deep_network_closer(deep: nn.Module, digits_calibration: Tensor, digits_test: tuple[Tensor, Tensor]) -> None:
    """On other images than those that it was chosen on."""
    images = digits_test[0]
    with torch.no_grad():
        wanted = deep(images)
        plain, leaky = (
            qs.convert(deep, digits_calibration, method(*some, steps=8, initial=0.0))(images) for some in ((), (LeakyReadout(),))
        )
    assert float((leaky - wanted).square().mean()) < 0.8 * float((plain - wanted).square().mean())
    assert int((leaky.argmax(1) == wanted.argmax(1)).sum()) > int((plain.argmax(1) == wanted.argmax(1)).sum())


@pytest.mark.parametrize("shape", [(), (3,), (2, 4, 4)], ids=str)
def test_answers_of_any_shape_are_read(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    count = max(1, math.prod(shape))
    layers: list[nn.Module] = [part for _ in range(6) for part in (nn.Linear(16, 16), nn.ReLU())]
    last = nn.Flatten(0) if not shape else nn.Unflatten(1, shape)
    network, images = nn.Sequential(*layers, nn.Linear(16, count), last).eval(), torch.randn(32, 16)
    some: tuple[tuple[qs.refinement.Refinement, ...], ...] = ((), (LeakyReadout(leak=LEAK),), (LeakyReadout(),))
    plain, leaky, chosen = (qs.convert(network, images, method(*one, steps=8, initial=0.0)) for one in some)
    assert leaky(images).shape == network(images).shape == (32, *shape)
    torch.testing.assert_close(leaky(images), faded(plain.outputs(images))[-1])
    torch.testing.assert_close(chosen(images), faded(plain.outputs(images), chosen.readout_leak or 1.0)[-1])


class TwoAnswers(nn.Module):
    """One of three values, one of a single one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.classes, self.value = nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"classes": self.classes(x), "value": self.value(x)}


@pytest.mark.parametrize("leak", [LEAK, 0.0], ids=["given", "chosen"])
def test_every_one_of_several_answers_is_read_alike(leak: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, images = TwoAnswers().eval(), torch.randn(24, 6)
    plain, leaky = (qs.convert(network, images, method(*some, initial=0.0)) for some in ((), (LeakyReadout(leak=leak),)))
    assert leaky.readout_leak is not None
    leaky.save(tmp_path / "net.safetensors")
    for snn in (leaky, qs.load(tmp_path / "net.safetensors")):
        for name, answer in snn(images).items():
            wanted = faded(plain.outputs(images)[name], leaky.readout_leak)
            torch.testing.assert_close(answer, wanted[-1])
            # With a state of its own each.
            torch.testing.assert_close(simulate(snn, images, step_by_step=True).readouts[name], wanted)


@pytest.mark.parametrize("after", [BiasCorrection(), WeightCalibration(iterations=20)], ids=["bias", "weights"])
def test_corrections_behind_it_correct_what_is_read(
    after: qs.refinement.Refinement, random_network: Networks, random_images: Images
) -> None:
    network, images = random_network("residual"), random_images("residual", 32, seed=1)
    snn = qs.convert(network, images, method(LeakyReadout(leak=0.5), after))
    with torch.no_grad():
        wanted, found = network(images), snn(images)
        plain = qs.convert(network, images, method(LeakyReadout(leak=0.5)))(images)
    assert snn.readout_leak == 0.5
    if isinstance(after, BiasCorrection):
        # Into the bias of the last layer: constants pass the readout as they are.
        (output,) = (node for node in snn.network.graph.nodes if node.op == "output")
        assert [node.target for node in output.all_input_nodes] == ["leaky_readout"]
        assert float((found - wanted).mean(0).abs().max()) < 0.2 * float((plain - wanted).mean(0).abs().max())
    else:
        assert float((found - wanted).square().mean()) < float((plain - wanted).square().mean())


def test_it_follows_shifts_and_groups(random_network: Networks, random_images: Images) -> None:
    network, images = random_network("chain"), random_images("chain", 16, seed=1)
    for some, options in (((OffsetShift(rho=2),), {}), ((), {"members": 3}), ((), {"signed": True})):
        plain = qs.convert(network, images, method(*some, **options))
        leaky = qs.convert(network, images, method(*some, LeakyReadout(leak=LEAK), **options))
        torch.testing.assert_close(leaky(images), faded(plain.outputs(images))[-1])


def test_auto_tries_it(digits_source: nn.Module, digits_calibration: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "refinements_for", lambda steps: [("bias_correction",)])
    found = choose(digits_source, digits_calibration, Auto(steps=3))
    tried = [one for one in found.attempts if one.what.endswith("| leaky_readout")]
    assert len(tried) == 1
    assert any(reason.startswith("readout: leaky_readout (") for reason in found.reasons)
    assert (found.network.readout_leak is not None) == found.what.endswith("| leaky_readout")
    rounds = choosing._Rounds(digits_source, digits_calibration, Auto(steps=3), None, (), PIECES, None)
    stream = ImageStream(rounds.fitted)
    ann = fit(digits_source, stream, method(steps=3))
    rounds._read_out(rounds._attempt(method(BiasCorrection(), steps=3), ann, stream), ann, stream)
    assert rounds.attempts[-1].what == "threshold_balancing | bias_correction | leaky_readout"
    waiting = rounds._attempt(method(steps=3, synchronous=True), ann, stream)
    assert rounds._read_out(waiting, ann, stream) is waiting
    assert rounds.reasons[-1].startswith("refused: leaky_readout: ") and "waits for whole windows" in rounds.reasons[-1]
    alone = choose(digits_source, digits_calibration, Auto(steps=1))
    assert not any("leaky_readout" in one.what for one in alone.attempts)
