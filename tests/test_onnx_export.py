"""Networks as ONNX files: onnxruntime gives our numbers, files are the same bytes, and damaged ones are refused."""

from __future__ import annotations

import copy
import functools
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quickspike as qs
from quickspike.conversion import SpikingNetwork
from quickspike.errors import CheckpointError, OptionError
from quickspike.onnx_export import check_onnx, initial_states, to_onnx
from quickspike.structure import tensors
from random_networks import LAYERS, NETWORKS, draw, draw_layers

onnx = pytest.importorskip("onnx", reason="ONNX files need the extra quickspike[onnx]")
pytest.importorskip("onnxscript", reason="ONNX files need the extra quickspike[onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="comparing needs onnxruntime")


@pytest.fixture(scope="module", autouse=True)
def one_registry() -> Iterator[None]:
    """torch.onnx reads all its translations anew at every export, which takes longer than these networks do."""
    registration = pytest.importorskip("torch.onnx._internal.exporter._registration")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration.ONNXRegistry, "from_torchlib", staticmethod(functools.cache(registration.ONNXRegistry.from_torchlib)))
        yield


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def whole(path: Path, images: Tensor) -> list[Tensor]:
    """What a file in the form `unrolled` gives."""
    return [torch.from_numpy(value) for value in session(path).run(None, {"images": images.numpy()})]


def in_steps(path: Path, images: Tensor) -> Tensor:
    """The mean over the steps of what a file in the form `step` gives."""
    ours, states = session(path), initial_states(path, len(images))
    names, total = [output.name for output in ours.get_outputs()], np.float32(0)
    steps = check_onnx(path)["steps"]
    for _ in range(steps):
        found = dict(zip(names, ours.run(names, {"images": images.numpy(), **states}), strict=True))
        states = {name: found[f"{name}.next"] for name in states}
        total = total + found["logits"]
    return torch.from_numpy(total / steps)


def close(found: Tensor, expected: Tensor) -> None:
    """Sums in another order, but no spike more or less: one changes the logits of these networks by more."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-5 * max(float(expected.abs().max()), 1e-3)


def same(snn: SpikingNetwork, images: Tensor, folder: Path, *, step: bool = True) -> None:
    """Both forms, for a batch of another size than the exporter's and for one image."""
    with torch.no_grad():
        expected = snn(images)
    to_onnx(snn, folder / "whole.onnx")
    close(whole(folder / "whole.onnx", images)[0], expected)
    close(whole(folder / "whole.onnx", images[:1])[0], expected[:1])
    if step:
        to_onnx(snn, folder / "step.onnx", "step")
        close(in_steps(folder / "step.onnx", images), expected)


@settings(max_examples=4, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(kind=st.sampled_from(["streaming", "signed", "synchronous", "to zero"]), **{**NETWORKS, "steps": st.integers(1, 8)})
def test_random_networks_give_our_logits(tmp_path_factory: pytest.TempPathFactory, kind: str, **drawn: Any) -> None:
    snn, images = draw(**drawn)
    snn = {"streaming": lambda: snn, "signed": snn.as_signed, "synchronous": snn.as_synchronous, "to zero": lambda: snn}[kind]()
    for neuron in snn.neurons().values():
        neuron.to_zero = kind == "to zero"
    same(snn, images, tmp_path_factory.mktemp("onnx"), step=kind != "synchronous")


def test_weighted_spikes_give_our_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, images = (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten()),
        torch.randn(6, 2, 10, 10),
    )
    for method, steps in (("potential_init", 4), ("ultra_low_latency", 3)):
        snn = qs.convert(net.eval(), images, method, steps=steps, weighted=True)
        same(snn, images, tmp_path, step=False)
    with pytest.raises(OptionError, match=r"its spikes are weighted.*unrolled"):
        to_onnx(snn, tmp_path / "step.onnx", "step")
    assert check_onnx(tmp_path / "whole.onnx")["neurons"][snn.sites[0].name]["weighted"] is True


@settings(max_examples=2, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(**{**LAYERS, "steps": st.integers(1, 4)})
def test_convolutions_of_all_kinds_give_our_logits(tmp_path_factory: pytest.TempPathFactory, **drawn: Any) -> None:
    snn, images = draw_layers(**drawn)
    same(snn, images, tmp_path_factory.mktemp("onnx"), step=False)


class Everything(nn.Module):
    """What a layer with time can be: neurons, a pool that accumulates, a normalisation of running means, a join with the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.relu, self.after, self.last, self.pool = nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.MaxPool2d(3, 1, 1)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(4, 5)
        self.average = nn.AvgPool2d(3, 1, 1, divisor_override=4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.first(x))
        y = self.after(self.norm(self.second(self.pool(y + self.average(y)))))
        return self.head(self.last(self.third(torch.cat([y, x], 1))).mean((2, 3)))


def everything(steps: int) -> tuple[SpikingNetwork, Tensor]:
    torch.manual_seed(3)
    model, images = Everything().eval(), torch.randn(5, 2, 8, 8)
    return qs.convert(model, images, "threshold_balancing", steps=steps, analog=("LayerNorm",)), images


def test_layers_with_time_of_every_kind(tmp_path: Path) -> None:
    snn, images = everything(4)
    kinds = {type(layer).__name__ for layer in snn.network.modules()}
    assert {"Neuron", "Repeat", "RunningMean", "Increment", "AccumulatedMaxPool"} <= kinds
    same(snn.as_signed(), images, tmp_path)
    states = check_onnx(tmp_path / "step.onnx")["states"]
    assert {"steps_done", "relu.v", "relu.left", "last.v"} <= set(states)
    assert not check_onnx(tmp_path / "whole.onnx")["states"]


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = torch.relu(self.first(x))
        return {"out": self.one(y), "more": (self.other(y), y)}


def test_several_outputs_have_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 6)
    snn = qs.convert(Several().eval(), images, steps=3)
    to_onnx(snn, tmp_path / "a.onnx")
    with torch.no_grad():
        expected = tensors(snn(images))
    for found, wanted in zip(whole(tmp_path / "a.onnx", images), expected, strict=True):
        close(found, wanted)
    assert [output.name for output in session(tmp_path / "a.onnx").get_outputs()] == ["out", "more_0", "more_1"]
    with pytest.raises(OptionError, match="form='step'"):
        initial_states(tmp_path / "a.onnx", 4)


# Whole numbers


class Summed(nn.Module):
    """The second convolution reads spikes, the classifier sums of `size` squared of them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.pool, self.head = nn.AvgPool2d(size), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(torch.relu(self.second(torch.relu(self.first(x))))).flatten(1))


@pytest.mark.parametrize(("size", "in_bytes"), [(8, ["second", "head"]), (15, ["second"])])
def test_whole_numbers_are_exact(tmp_path: Path, size: int, in_bytes: list[str]) -> None:
    torch.manual_seed(1)
    # Multiples of 1/8 in front: what is in floating point is exact, too.
    images = torch.randint(-8, 9, (6, 2, size, size)) / 8
    model = Summed(size).eval()
    with torch.no_grad():
        model.first.weight.copy_(torch.randint(-3, 5, model.first.weight.shape) / 8)
        model.first.bias.fill_(0.5)
        # All weights at the end of the grid, and of one sign: the largest sums that there are.
        model.head.weight.copy_(0.25 * torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0])[:, None].expand(7, 16))
    snn = qs.quantise(qs.convert(model, images, "potential_init", steps=4)).network
    with torch.no_grad():
        for neuron in list(snn.neurons().values())[1:]:
            neuron.initial.fill_(50)  # so that they fire at every step
        expected = snn(images)
    to_onnx(snn, tmp_path / "a.onnx", integers=True)
    described = check_onnx(tmp_path / "a.onnx")["integers"]
    assert described["weights"] == in_bytes
    assert [entry.split(":")[0] for entry in described["in floating point"]] == ["head"] * ("head" not in in_bytes)
    assert torch.equal(whole(tmp_path / "a.onnx", images)[0], expected)
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "a.onnx").graph.initializer}
    assert {stored[f"{layer}.weight"] for layer in in_bytes} == {onnx.TensorProto.INT8}


def test_a_whole_image_gives_the_same_numbers_in_every_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Summed(8).eval(), torch.randn(64, 2, 8, 8)
    snn = qs.quantise(qs.convert(model, images, steps=4), image_bits=10).network
    to_onnx(snn, tmp_path / "a.onnx", integers=True)
    expected = snn(images)
    # The last units are real numbers, whose mean over the steps rounds.
    torch.testing.assert_close(whole(tmp_path / "a.onnx", images)[0], expected, rtol=1e-6, atol=1e-6)
    # Rounding the image is not optimised away.
    assert not torch.equal(qs.quantise(qs.convert(model, images, steps=4)).network(images), expected)
    torch.testing.assert_close(copy.deepcopy(snn).double()(images.double()).float(), expected, rtol=1e-6, atol=1e-6)


# Files


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[SpikingNetwork, Path]:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    snn = perceptron()
    to_onnx(snn, path, "step")
    return snn, path


def perceptron() -> SpikingNetwork:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 5)).eval()
    return qs.convert(model, torch.randn(8, 6), steps=3)


def test_files_say_what_they_hold(written: tuple[SpikingNetwork, Path]) -> None:
    snn, path = written
    said = check_onnx(path)
    assert (said["form"], said["steps"], said["input_shape"], said["quickspike"]) == ("step", 3, [6], qs.__version__)
    assert said["method"] == snn.method
    assert list(said["states"]) == ["1.v", "3.v"]
    states = initial_states(path, 4)
    neuron = snn.neuron("1")
    expected = (neuron.initial * neuron.threshold).expand(4, 9)
    np.testing.assert_array_equal(states["1.v"], expected.numpy())


def test_files_are_the_same_bytes_in_every_process_and_name_no_folder(written: tuple[SpikingNetwork, Path], tmp_path: Path) -> None:
    path = written[1]
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); from test_onnx_export import perceptron, to_onnx; "
        "to_onnx(perceptron(), sys.argv[1], 'step')"
    )
    arguments = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "again.onnx"), str(Path(__file__).parent)]
    subprocess.run(arguments, check=True, timeout=300)
    data = path.read_bytes()
    assert (tmp_path / "again.onnx").read_bytes() == data
    for folder in (str(Path(qs.__file__).parents[2]), "site-packages", ".py", "Traceback", "torch"):
        assert folder.encode() not in data


def test_damaged_and_foreign_files_are_refused(written: tuple[SpikingNetwork, Path], tmp_path: Path) -> None:
    data, path = written[1].read_bytes(), tmp_path / "other.onnx"
    for end in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match=r"other\.onnx"):
            check_onnx(path)
    for place in [*range(0, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match=r"other\.onnx"):
            check_onnx(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="altered"):
        check_onnx(path)
    model = onnx.load_model_from_string(data)
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="no ONNX file that quickspike wrote"):
        check_onnx(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        check_onnx(tmp_path / "missing.onnx")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "1"}', "[" * 100_000])
def test_metadata_that_an_attacker_sealed_are_refused(text: str, written: tuple[SpikingNetwork, Path], tmp_path: Path) -> None:
    model = onnx.load_model_from_string(written[1].read_bytes())
    for entry in model.metadata_props:
        entry.value = {"quickspike": text, "quickspike.sha256": "0" * 64}[entry.key]
    data = model.SerializeToString(deterministic=True)
    path = tmp_path / "other.onnx"
    path.write_bytes(data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode()))
    with pytest.raises(CheckpointError, match=r"other\.onnx: its metadata"):
        check_onnx(path)


def test_what_cannot_be_exported_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snn, path = perceptron(), tmp_path / "a.onnx"
    with pytest.raises(OptionError, match="unrolled, step, got 'loop'"):
        to_onnx(snn, path, cast(Any, "loop"))
    with pytest.raises(OptionError, match="export the one that it was made from"):
        to_onnx(qs.accelerate(snn, "fused"), path)
    with pytest.raises(OptionError, match=re.escape("call snn.float()")):
        to_onnx(qs.convert(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double(), torch.randn(4, 2).double()), path)
    with pytest.raises(OptionError, match="waits for all 3 steps"):
        to_onnx(snn.as_synchronous(), path, "step")
    with pytest.raises(OptionError, match="take quantise"):
        to_onnx(snn, path, integers=True)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(OptionError, match=re.escape("pip install 'quickspike[onnx]'")):
        to_onnx(snn, path)
    assert not path.exists()
