"""Files of spiking networks: exact round trips, and refusal of everything that is not whole, unaltered and ours."""

from __future__ import annotations

import copy
import errno
import functools
import json
import pickle
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quickspike as qs
from quickspike import checkpoint
from quickspike.activations import CeilingProbe
from quickspike.errors import CheckpointError, QuickspikeError
from quickspike.files import OutputError
from quickspike.method import Method, Paper
from quickspike.models import ModelError, load_weights
from quickspike.neuron import NeuronParameters, Surrogate, Timed

STEPS = 4


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Residual(nn.Module):
    """Timed and constant operands meet, so the file has to hold a Repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.block = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.block(x)).relu()
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 3, padding=1)
        self.act = nn.ReLU6()
        self.head = nn.Conv2d(5, 3, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.act(self.left(x)), self.act(self.right(x))], dim=1)
        return self.head(x).flatten(1)


class Pooled(nn.Module):
    """The pool reads a sum of two activations and cannot move, so the file has to hold an AccumulatedMaxPool."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.left(x).relu() + self.right(x).relu())
        return self.head(x.view(x.size(0), -1))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding="valid", groups=2),
            nn.ReLU6(),
            nn.ZeroPad2d((1, 0, 2, 1)),
            nn.Conv2d(4, 4, 2, dilation=(2, 1), padding=1, padding_mode="circular"),
            nn.Hardtanh(0, 2),
            nn.ChannelShuffle(2),
            nn.AvgPool2d(2),
        )
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class Shared(nn.Module):
    """One convolution and one activation, each under two names and each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 1)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.again, self.act = self.conv, nn.ReLU()
        self.twin = self.act
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.twin(self.conv(x))
        x = self.act(self.again(x))
        return self.head(x.mean((2, 3)))


class Constants(nn.Module):
    """Two buffers, a bare parameter, a plain attribute and a literal tensor join the signal."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(1, 2, 6, 6))
        self.offset = torch.randn(4, 1, 1)
        self.gain = nn.Parameter(torch.rand(1, 4, 1, 1) + 0.5)
        self.inner = nn.Module()
        self.inner.register_buffer("kernel", torch.randn(4, 2, 3, 3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x - self.shift, self.inner.kernel, padding=1)
        x = F.relu(x * self.gain + self.offset)
        return self.head(x.mean((2, 3))) + torch.tensor([0.1, 0.2, 0.3])


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (Plain, (2, 6, 6)),
    "residual": (Residual, (2, 6, 6)),
    "cat": (Joined, (2, 6, 6)),
    "max_pool": (Pooled, (2, 6, 6)),
    "grouped": (Grouped, (2, 9, 9)),
    "shared": (Shared, (2, 6, 6)),
    "constants": (Constants, (2, 6, 6)),
    "vector": (Vector, (5,)),
}


@dataclass(frozen=True, kw_only=True)
class Leaky(Method):
    """Every field of NeuronParameters away from its default; not registered, so that no other program knows it."""

    name: ClassVar[str] = "known_to_this_test_only"
    paper: ClassVar[Paper] = Paper("nobody", "nothing", 2000, "0000.00000")

    def activation(self, site: Any) -> nn.Module:
        return CeilingProbe(site, "layer")

    def neuron(self, site: Any, activation: nn.Module) -> NeuronParameters:
        spread = torch.linspace(0.5, 1.5, site.channels)
        return NeuronParameters(
            threshold=site.per_channel(spread),
            initial=torch.tensor(0.3),
            leak=site.per_channel(0.5 + spread / 4),
            amplitude=site.per_channel(spread.flip(0)),
            scaled=False,
            strict=True,
        )


def images_for(shape: tuple[int, ...], batch: int = 6) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))


def network(name: str, method: str | Method = "threshold_balancing", **options: Any) -> tuple[qs.SpikingNetwork, Tensor]:
    """A spiking network and images for it, the same at every call."""
    factory, shape = NETWORKS[name]
    images = images_for(shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = factory()
        with torch.no_grad():
            model(images)
            for parameter in model.parameters():
                parameter.mul_(1.5)
    if isinstance(method, str):
        options = {"steps": STEPS, **options}
    return qs.convert(model, images, method, **options), images


def without_annotations(code: str) -> str:
    """They are not part of what runs; `test_code_is_the_same_text` looks at them."""
    return re.sub(r" : _Tensor_| -> _Tensor_", "", code)


def assert_same(one: qs.SpikingNetwork, other: qs.SpikingNetwork, images: Tensor) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert set(mine) == set(theirs)
    for key, value in mine.items():
        assert value.dtype == theirs[key].dtype
        assert value.shape == theirs[key].shape
        assert torch.equal(value.reshape(-1).view(torch.uint8), theirs[key].reshape(-1).view(torch.uint8)), key
    assert without_annotations(one.code) == without_annotations(other.code)
    assert one.sites == other.sites
    assert one.steps == other.steps
    assert one.input_shape == other.input_shape
    assert one.method == other.method
    assert one.provenance == other.provenance
    with torch.no_grad():
        a, b = one.run(images), other.run(images)
        assert torch.equal(a.logits, b.logits)
        assert list(a.spikes) == list(b.spikes)
        for site, counts in a.spikes.items():
            assert torch.equal(counts, b.spikes[site])
        assert torch.equal(one(images), other(images))


@pytest.fixture(scope="module")
def plain() -> tuple[qs.SpikingNetwork, Tensor]:
    return network("plain")


@pytest.fixture(scope="module")
def pooled() -> tuple[qs.SpikingNetwork, Tensor]:
    return network("max_pool")


@pytest.fixture
def saved(plain: tuple[qs.SpikingNetwork, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "network.safetensors"
    plain[0].save(path)
    return path


# Round trips


@pytest.mark.parametrize("method", ["threshold_balancing", "potential_init"])
@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_is_bit_exact(name: str, method: str, tmp_path: Path) -> None:
    snn, images = network(name, method)
    snn.save(tmp_path / "a.safetensors")
    loaded = qs.load(tmp_path / "a.safetensors")
    assert_same(snn, loaded, images)
    assert not loaded.training
    assert {k: p.requires_grad for k, p in snn.named_parameters()} == {k: p.requires_grad for k, p in loaded.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_code_is_the_same_text(name: str, tmp_path: Path) -> None:
    snn, _ = network(name)
    snn.save(tmp_path / "a")
    assert qs.load(tmp_path / "a").code == snn.code


def test_a_buffer_that_is_left_out_of_the_state_dict_is_saved_all_the_same(tmp_path: Path) -> None:
    class Transient(Vector):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.randn(5), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - self.shift)

    images = images_for((5,))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        snn = qs.convert(Transient(), images, steps=2)
    snn.save(tmp_path / "a")
    loaded = qs.load(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(loaded(images), snn(images))


def test_parameters_keep_their_order(tmp_path: Path) -> None:
    """Optimisers know parameters by position; another order would give each the state of another."""
    for name in ("plain", "residual", "shared"):
        snn, _ = network(name)
        snn.save(tmp_path / "a")
        assert [key for key, _ in qs.load(tmp_path / "a").named_parameters()] == [key for key, _ in snn.named_parameters()]


def test_networks_hold_what_the_round_trip_is_meant_to_cover() -> None:
    def kinds(name: str) -> set[str]:
        return {type(layer).__name__ for layer in network(name)[0].network.modules()}

    assert "Repeat" in kinds("residual")
    assert "AccumulatedMaxPool" in kinds("max_pool")
    assert [node.op for node in network("constants")[0].network.graph.nodes].count("get_attr") >= 4
    assert len(network("shared")[0].sites) == 3


def test_round_trip_keeps_every_neuron_setting(tmp_path: Path) -> None:
    surrogate = Surrogate("arctan", 0.7, 2.5)
    snn, images = network("residual", Leaky(steps=3), surrogate=surrogate)
    snn.save(tmp_path / "a.safetensors")
    loaded = qs.load(tmp_path / "a.safetensors")
    assert_same(snn, loaded, images)
    for site in snn.sites:
        neuron = loaded.neuron(site.name)
        assert (neuron.scaled, neuron.strict, neuron.steps, neuron.surrogate) == (False, True, 3, surrogate)
        assert neuron.constant_input == snn.neuron(site.name).constant_input


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_round_trip_keeps_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    snn, images = network("vector")
    snn = snn.to(dtype)
    snn.save(tmp_path / "a.safetensors")
    loaded = qs.load(tmp_path / "a.safetensors")
    assert_same(snn, loaded, images.to(dtype))


def test_round_trip_of_other_steps_and_of_a_loaded_network(plain: tuple[qs.SpikingNetwork, Tensor], tmp_path: Path) -> None:
    snn, images = plain
    longer = snn.with_steps(9)
    longer.save(tmp_path / "a.safetensors")
    loaded = qs.load(tmp_path / "a.safetensors")
    assert_same(longer, loaded, images)
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_saving_and_loading_change_neither_the_network_nor_the_random_state(
    plain: tuple[qs.SpikingNetwork, Tensor], tmp_path: Path
) -> None:
    snn = copy.deepcopy(plain[0]).train()
    state, random_state = copy.deepcopy(snn.state_dict()), torch.get_rng_state()
    snn.save(tmp_path / "a.safetensors")
    qs.load(tmp_path / "a.safetensors")
    assert snn.training
    assert all(torch.equal(value, state[key]) for key, value in snn.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_channels_last_weights_round_trip(plain: tuple[qs.SpikingNetwork, Tensor], tmp_path: Path) -> None:
    snn = copy.deepcopy(plain[0]).to(memory_format=torch.channels_last)
    snn.save(tmp_path / "a.safetensors")
    loaded = qs.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded.network.conv.weight, plain[0].network.conv.weight)


@pytest.mark.parametrize("key", ["3x3", "conv-1", "größe", "a b"])
def test_layer_names_that_are_no_identifiers(key: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten())
    model.add_module(key, nn.Linear(5, 4))
    model.add_module("act", nn.ReLU())
    model.add_module("head", nn.Linear(4, 3))
    snn = qs.convert(model, images_for((5,)), steps=2)
    path = tmp_path / "a.safetensors"
    # A name that no file can hold has to be refused while the network is still in memory.
    try:
        snn.save(path)
    except CheckpointError:
        assert not path.exists()
        return
    assert_same(snn, qs.load(path), images_for((5,)))


@pytest.mark.parametrize(("tensor", "value"), [("threshold", -0.1), ("leak", 1.2), ("leak", -0.1), ("threshold", float("nan"))])
def test_what_save_accepts_load_accepts(tensor: str, value: float, plain: tuple[qs.SpikingNetwork, Tensor], tmp_path: Path) -> None:
    """An optimiser may step over the bounds of a learned parameter; that must not cost the trained network."""
    snn = copy.deepcopy(plain[0])
    with torch.no_grad():
        getattr(snn.neuron(snn.sites[0].name), tensor).fill_(value)
    path = tmp_path / "a.safetensors"
    try:
        snn.save(path)
    except CheckpointError:
        assert not path.exists()
        return
    loaded = qs.load(path)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(snn.parameters(), loaded.parameters(), strict=True))


def test_infinite_padding_round_trips_or_is_refused_as_a_user_error(tmp_path: Path) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pad, self.pool = nn.Conv2d(2, 3, 1), nn.ConstantPad2d(1, float("-inf")), nn.MaxPool2d(2)
            self.head = nn.Linear(48, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pool(self.pad(self.conv(x))).relu().flatten(1))

    snn, path = qs.convert(Padded(), images_for((2, 6, 6)), steps=2), tmp_path / "a.safetensors"
    try:
        snn.save(path)
    except CheckpointError:
        assert not path.exists()
        return
    assert_same(snn, qs.load(path), images_for((2, 6, 6)))


@pytest.mark.parametrize("value", [float("nan"), Path("x"), {1, 2}], ids=["nan", "path", "set"])
def test_provenance_that_json_cannot_hold_is_a_user_error(value: Any, plain: tuple[qs.SpikingNetwork, Tensor], tmp_path: Path) -> None:
    snn = copy.deepcopy(plain[0])
    snn.provenance["note"] = value
    with pytest.raises(QuickspikeError):
        snn.save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_without_a_place_in_the_format_is_refused(plain: tuple[qs.SpikingNetwork, Tensor], tmp_path: Path) -> None:
    snn = copy.deepcopy(plain[0])
    snn.network.set_submodule("head", nn.Bilinear(4, 4, 3))
    with pytest.raises(CheckpointError, match="Bilinear"):
        snn.save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_two_saves_give_identical_bytes(tmp_path: Path) -> None:
    for name in ("plain", "max_pool", "constants"):
        files = [tmp_path / f"{name}{number}" for number in range(6)]
        for file in files:
            network(name)[0].save(file)
        assert len({file.read_bytes() for file in files}) == 1


FRESH = """
import re, sys, torch
import quickspike as qs

try:
    import test_checkpoint
except ImportError:
    pass
else:
    raise SystemExit("the source network's class is importable here")
folder, names = sys.argv[1], sys.argv[2:]
for name in names:
    snn = qs.load(f"{folder}/{name}.safetensors")
    expected = torch.load(f"{folder}/{name}.pt", weights_only=True)
    with torch.no_grad():
        run = snn.run(expected["images"])
    assert torch.equal(run.logits, expected["logits"]), name
    assert re.sub(" : _Tensor_| -> _Tensor_", "", snn.code) == expected["code"], name
    assert snn.method == expected["method"], name
    assert list(run.spikes) == list(expected["spikes"]), name
    assert all(torch.equal(run.spikes[site], counts) for site, counts in expected["spikes"].items()), name
    snn.save(f"{folder}/{name}.again")
from quickspike.method import all_methods
assert "known_to_this_test_only" not in all_methods()
print("same")
"""


def test_loads_in_a_fresh_process_without_the_source_class_or_the_method(tmp_path: Path) -> None:
    cases = {name: network(name) for name in NETWORKS}
    cases["unknown_method"] = network("residual", Leaky(steps=3))
    for name, (snn, images) in cases.items():
        snn.save(tmp_path / f"{name}.safetensors")
        with torch.no_grad():
            run = snn.run(images)
        expected = {
            "images": images,
            "logits": run.logits,
            "spikes": dict(run.spikes),
            "code": without_annotations(snn.code),
            "method": snn.method,
        }
        torch.save(expected, tmp_path / f"{name}.pt")
    command = [sys.executable, "-c", FRESH, str(tmp_path), *cases]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "same"
    for name in cases:
        assert (tmp_path / f"{name}.again").read_bytes() == (tmp_path / f"{name}.safetensors").read_bytes()


# Files that were damaged or are not ours


def same_or_refused(path: Path, snn: qs.SpikingNetwork, images: Tensor) -> bool:
    """True if refused; fails if the file loads as something else or raises anything but CheckpointError."""
    try:
        loaded = qs.load(path)
    except CheckpointError:
        return True
    assert_same(snn, loaded, images)
    return False


def test_every_truncation_is_refused(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    offsets = {0, 1, 7, 8, 9, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 60)}
    for offset in sorted(offsets):
        path = tmp_path / "cut"
        path.write_bytes(whole[:offset])
        with pytest.raises(CheckpointError) as caught:
            qs.load(path)
        assert str(path) in str(caught.value), offset


def test_every_flipped_byte_is_refused(saved: Path, plain: tuple[qs.SpikingNetwork, Tensor], tmp_path: Path) -> None:
    whole, generator = saved.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    positions = [*range(8), *generator.sample(range(8, header), 120), *generator.sample(range(header, len(whole)), 80)]
    refused = 0
    for position in positions:
        changed = bytearray(whole)
        changed[position] ^= generator.randrange(1, 256)
        path = tmp_path / "flipped"
        path.write_bytes(changed)
        refused += same_or_refused(path, *plain)
    # Only the blanks that safetensors pads its header with carry no meaning.
    assert refused >= len(positions) - 8


def test_appended_bytes_and_swapped_blocks_are_refused(saved: Path, tmp_path: Path) -> None:
    whole, path = saved.read_bytes(), tmp_path / "b"
    for changed in (whole + b"\0", whole + whole, whole[:-8] + whole[-4:] + whole[-8:-4], b"\0" * len(whole), whole[8:]):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            qs.load(path)


def test_foreign_files_are_refused_with_a_reason(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({name: value.contiguous() for name, value in Plain().state_dict().items()}, weights)
    with pytest.raises(CheckpointError, match="not one that quickspike saved"):
        qs.load(weights)
    (tmp_path / "nothing").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"truncated|empty"):
        qs.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is a folder"):
        qs.load(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        qs.load(tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("quickspike " * 100)
    with pytest.raises(CheckpointError):
        qs.load(str(tmp_path / "text"))
    with pytest.raises(CheckpointError):
        qs.load("a\0b")


class Bomb:
    """Unpickling an instance creates the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".th", ".bin", ""])
@pytest.mark.parametrize("writer", ["torch", "torch_legacy", "pickle"])
def test_a_pickle_is_never_run(writer: str, suffix: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / f"bomb{suffix}"
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"weight": Bomb(marker)}))
    else:
        torch.save({"state_dict": {"weight": Bomb(marker)}}, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(CheckpointError):
        qs.load(path)
    with pytest.raises(ModelError, match="without running code"):
        load_weights(Plain(), path)
    assert not marker.exists()


def test_the_bomb_would_go_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_what_is_written_to_the_file_later_changes_no_network(saved: Path, plain: tuple[qs.SpikingNetwork, Tensor]) -> None:
    """The checksum was that of the file as it was; a mapped file would go on changing, and end the process where it is cut."""
    loaded = qs.load(saved)
    with saved.open("r+b") as file:
        file.write(b"\x7f" * saved.stat().st_size)
    assert_same(plain[0], loaded, plain[1])
    saved.write_bytes(b"")
    assert_same(plain[0], loaded, plain[1])


@pytest.mark.parametrize("steps", [1, 2, 50_000])
def test_the_check_of_a_network_does_not_depend_on_its_steps(steps: int, pooled: tuple[qs.SpikingNetwork, Tensor], tmp_path: Path) -> None:
    pooled[0].with_steps(steps).save(tmp_path / "a")
    started = time.process_time()
    loaded = qs.load(tmp_path / "a")
    assert time.process_time() - started < 5
    assert {layer.steps for layer in loaded.modules() if isinstance(layer, Timed)} == {steps}


# Headers written by an attacker who also computes the right digest


def rewrite(source: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    """Write a copy of a saved network whose header and tensors went through `change`; a returned string is the header."""
    with safetensors.safe_open(source, framework="pt") as file:
        header = json.loads(file.metadata()["quickspike"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    text = change(header, tensors)
    if not isinstance(text, str):
        text = json.dumps(header, sort_keys=True)
    target.write_bytes(safetensors.torch.save(tensors, {"quickspike": text, "sha256": checkpoint._digest(text, tensors)}))


Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def put(*path: Any, value: Any) -> Change:
    """A change that sets one entry of the header; a callable value makes it from the old one."""

    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        owner: Any = header
        for part in path[:-1]:
            owner = owner[part]
        owner[path[-1]] = value

    return change


def drop(*path: Any) -> Change:
    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        owner: Any = header
        for part in path[:-1]:
            owner = owner[part]
        del owner[path[-1]]

    return change


def rename_layer(new: str) -> Change:
    """Rename the readout everywhere, consistently: what is wrong is the name alone."""

    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        header["layers"][new] = header["layers"].pop("head")
        for node in header["graph"]:
            node["target"] = new if node["target"] == "head" else node["target"]
        for key in [key for key in tensors if key.startswith("head.")]:
            tensors[f"{new}.{key.removeprefix('head.')}"] = tensors.pop(key)

    return change


def rename_node(new: str) -> Change:
    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
        text = json.dumps(header, sort_keys=True)
        return text.replace('{"node": "head"}', json.dumps({"node": new})).replace('"name": "head"', '"name": ' + json.dumps(new))

    return change


def function(target: Any, op: str = "call_function") -> Change:
    """Let the node `mean` call something else, with a harmless looking argument."""

    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        node = next(node for node in header["graph"] if node["target"] == "mean")
        node.update(op=op, target=target)
        node["args"] = {"tuple": ["__import__('pathlib').Path('marker').touch()"]}

    return change


def tensor(name: str, value: Callable[[Tensor], Tensor | None]) -> Change:
    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        new = value(tensors[name])
        if new is None:
            del tensors[name]
        else:
            tensors[name] = new

    return change


def add_node(position: int, **node: Any) -> Change:
    """Insert a node; named fields replace those of a harmless one."""

    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        first = header["graph"][0]["name"]
        harmless = {"name": "extra", "op": "call_function", "target": "neg", "args": {"tuple": [{"node": first}]}, "kwargs": {"dict": {}}}
        header["graph"].insert(position if position >= 0 else len(header["graph"]) + 1 + position, harmless | node)

    return change


def nested(depth: int) -> Change:
    """The arguments of the last node, `depth` lists deep."""

    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
        header["graph"][-1]["args"] = "HERE"
        return json.dumps(header, sort_keys=True).replace('"HERE"', "[" * depth + "]" * depth)

    return change


def nested_tuples(depth: int) -> Change:
    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
        header["graph"][-1]["args"] = "HERE"
        return json.dumps(header, sort_keys=True).replace('"HERE"', '{"tuple": [' * depth + "]}" * depth)

    return change


def both(*changes: Change) -> Change:
    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for one in changes:
            one(header, tensors)

    return change


TOUCH = "__import__('pathlib').Path('marker').touch()"
HOSTILE: dict[str, Change] = {
    "layer type unknown": put("layers", "conv", "type", value="Evil"),
    "layer type outside the table": put("layers", "conv", "type", value="Bilinear"),
    "layer type of the base class": put("layers", "conv", "type", value="Module"),
    "layer type is code": put("layers", "conv", "type", value=TOUCH),
    "layer type is a list": put("layers", "conv", "type", value=["Conv2d"]),
    "layer is a number": put("layers", "conv", value=3),
    "layer is missing": drop("layers", "conv"),
    "layers is a list": put("layers", value=[]),
    "layer without arguments": drop("layers", "conv", "arguments"),
    "layer with an unknown argument": put("layers", "conv", "arguments", "dict", "evil", value=1),
    "layer that chooses its device": put("layers", "conv", "arguments", "dict", "device", value="cpu"),
    "layer that chooses its dtype": put("layers", "conv", "arguments", "dict", "dtype", value="float64"),
    "layer with a billion channels": both(
        put("layers", "conv", "arguments", "dict", "in_channels", value=10**9),
        put("layers", "conv", "arguments", "dict", "out_channels", value=10**9),
    ),
    "convolution with strides of another number": put("layers", "conv", "arguments", "dict", "stride", value={"tuple": [1, 1, 1]}),
    "convolution without a stride": put("layers", "conv", "arguments", "dict", "stride", value={"tuple": [0, 1]}),
    "convolution with a dilation of 0": put("layers", "conv", "arguments", "dict", "dilation", value={"tuple": [1, 0]}),
    "neurons that read two signals": put("graph", 2, "args", value={"tuple": [{"node": "conv"}, {"node": "conv"}]}),
    "convolution that gives another size": put("layers", "conv", "arguments", "dict", "padding", value={"tuple": [0, 0]}),
    "convolution with a billion zeros around": put("layers", "conv", "arguments", "dict", "padding", value={"tuple": [10**9, 10**9]}),
    "weights of another type than the others": tensor("conv.weight", lambda old: old.double()),
    "complex weights": tensor("head.weight", lambda old: old.to(torch.complex64)),
    "mean along an axis that is none": put("graph", 3, "args", value={"tuple": [{"node": "relu"}, {"tuple": [2, 2**63]}]}),
    "a billion letters": add_node(1, target="mul", args={"tuple": ["x", 10**12]}),
    "a number that grows": add_node(1, target="mul", args={"tuple": [2**62, 2**62]}),
    "taken apart a billion times": both(
        add_node(1, target="unbind", args={"tuple": [{"node": "wide"}]}),
        add_node(1, name="wide", target="expand", args={"tuple": [{"node": "shift"}, 10**9]}),
        lambda header, tensors: tensors.update(shift=torch.zeros(1)),
        add_node(1, name="shift", op="get_attr", target="shift", args={"tuple": []}),
    ),
    "an answer without steps": put("graph", -1, "args", value={"tuple": [{"node": "x"}]}),
    "layer with a negative size": put("layers", "conv", "arguments", "dict", "out_channels", value=-4),
    "layer with a size that is text": put("layers", "conv", "arguments", "dict", "out_channels", value="4"),
    "linear of a billion": put("layers", "head", "arguments", "dict", "in_features", value=10**9),
    "linear beyond 64 bits": put("layers", "head", "arguments", "dict", "in_features", value=10**30),
    "function eval": function("eval"),
    "function exec": function("exec"),
    "function os.system": function("os.system"),
    "function builtins.__import__": function("builtins.__import__"),
    "function torch.load": function("torch.load"),
    "function is code": function(TOUCH),
    "function is a list": function(["mean"]),
    "function is null": function(None),
    "tensor method": function("numpy", op="call_method"),
    "attribute of the module": function("__class__", op="get_attr"),
    "attribute that is no tensor": function("conv", op="get_attr"),
    "attribute below a layer": function("conv.weight", op="get_attr"),
    "module that is no layer": function("training", op="call_module"),
    "operation unknown": function("mean", op="evil"),
    "operation root": function("mean", op="root"),
    "node name is code": rename_node(f"a = {TOUCH}; b"),
    "node name breaks a line": rename_node("a\n    import os"),
    "node name empty": rename_node(""),
    "node name dunder": rename_node("__class__"),
    "node name with a quote": rename_node('a"); import os; ("'),
    "node name is a number": put("graph", 1, "name", value=3),
    "layer name __class__": rename_layer("__class__"),
    "layer name __dict__.x": rename_layer("__dict__.x"),
    "layer name forward": rename_layer("forward"),
    "layer name _modules": rename_layer("_modules"),
    "layer name _modules.x": rename_layer("_modules.x"),
    "layer name training": rename_layer("training"),
    "layer name with a quote": rename_layer('a"); import os; ("'),
    "layer name that is code": rename_layer(f"a = {TOUCH}"),
    "layer name with a backslash": rename_layer("a\\"),
    "layer name with a line break": rename_layer("a\nb"),
    "layer name empty": rename_layer(""),
    "layer name with an empty part": rename_layer("a..b"),
    "layer name that starts with a dot": rename_layer(".a"),
    "layer below a layer that is a tensor": rename_layer("conv.weight"),
    "tensor name is code": lambda header, tensors: tensors.update({f'"]; {TOUCH}; ["': torch.zeros(1)}),
    "tensor name __class__": lambda header, tensors: tensors.update({"__class__": torch.zeros(1)}),
    "placeholder target is code": put("graph", 0, "target", value=f"x={TOUCH}"),
    "placeholder target is self": put("graph", 0, "target", value="self"),
    "placeholder default is code": put("graph", 0, "args", value={"tuple": [{"call": TOUCH}]}),
    "keyword is code": put("graph", -2, "kwargs", value={"dict": {f"a={TOUCH}, b": 1}}),
    "keyword is a keyword": put("graph", -2, "kwargs", value={"dict": {"lambda": 1}}),
    "argument with an unknown tag": put("graph", -2, "args", value={"eval": TOUCH}),
    "argument with two tags": put("graph", -2, "args", value={"tuple": [], "node": "x"}),
    "argument without a tag": put("graph", -2, "args", value={}),
    "argument that names no node": put("graph", -2, "args", value={"tuple": [{"node": "nobody"}]}),
    "argument that names a later node": put("graph", 1, "args", value={"tuple": [{"node": "head"}]}),
    "argument that names a list": put("graph", 1, "args", value={"tuple": [{"node": []}]}),
    "arguments are text": put("graph", 1, "args", value=TOUCH),
    "nested deeper than JSON is read": nested(100_000),
    "nested deeper than Python recurses": nested(900),
    "nested tuples": nested_tuples(400),
    "graph empty": put("graph", value=[]),
    "graph is text": put("graph", value=TOUCH),
    "graph without output": drop("graph", -1),
    "graph without input": drop("graph", 0),
    "second input": add_node(1, op="placeholder", target="y", args={"tuple": []}),
    "second output": add_node(-2, op="output", target="output"),
    "node after the output": add_node(-1),
    "node of a name that is taken": add_node(1, name="head"),
    "node without a name": add_node(1, name=None),
    "node without fields": lambda header, tensors: header["graph"].insert(1, {}),
    "steps 0": put("steps", value=0),
    "steps negative": put("steps", value=-1),
    "steps true": put("steps", value=True),
    "steps a fraction": put("steps", value=2.5),
    "steps text": put("steps", value="4"),
    "steps null": put("steps", value=None),
    "steps missing": drop("steps"),
    "format missing": drop("format"),
    "format 0": put("format", value=0),
    "format text": put("format", value="1"),
    "format a fraction": put("format", value=1.5),
    "flag strict is a number": put("layers", "relu", "arguments", "strict", value=1),
    "flag scaled is text": put("layers", "relu", "arguments", "scaled", value="false"),
    "flag constant_input is null": put("layers", "relu", "arguments", "constant_input", value=None),
    "flag missing": drop("layers", "relu", "arguments", "strict"),
    "surrogate unknown": put("layers", "relu", "arguments", "surrogate", "shape", value="evil"),
    "surrogate of width 0": put("layers", "relu", "arguments", "surrogate", "width", value=0),
    "surrogate with an unknown field": put("layers", "relu", "arguments", "surrogate", "evil", value=0),
    "surrogate of width NaN": put("layers", "relu", "arguments", "surrogate", "width", value=float("nan")),
    "threshold NaN": tensor("relu.threshold", lambda old: old * float("nan")),
    "threshold infinite": tensor("relu.threshold", lambda old: old + float("inf")),
    "threshold of whole numbers": tensor("relu.threshold", lambda old: torch.ones(old.shape, dtype=torch.int64)),
    "threshold of another channel count": tensor("relu.threshold", lambda old: torch.ones(5, 1, 1)),
    "threshold with too many axes": tensor("relu.threshold", lambda old: torch.ones(7, 1, 1, 1, 1)),
    "threshold missing": tensor("relu.threshold", lambda old: None),
    "leak NaN": tensor("relu.leak", lambda old: old * float("nan")),
    "neuron with an extra tensor": lambda header, tensors: tensors.update({"relu.extra": torch.zeros(1)}),
    "weight of another shape": tensor("conv.weight", lambda old: old[:3].clone()),
    "weight transposed": tensor("head.weight", lambda old: old.t().contiguous()),
    "weight missing": tensor("conv.weight", lambda old: None),
    "weight of whole numbers": tensor("conv.weight", lambda old: old.long()),
    "bias missing": tensor("head.bias", lambda old: None),
    "layer with an extra tensor": lambda header, tensors: tensors.update({"conv.extra": torch.zeros(1)}),
    "site that is no layer": put("sites", 0, "name", value="nobody"),
    "site that is no neuron": put("sites", 0, "name", value="conv"),
    "site with an unknown field": put("sites", 0, "evil", value=1),
    "site without a shape": drop("sites", 0, "shape"),
    "site whose shape is text": put("sites", 0, "shape", value=["4", "6", "6"]),
    "site of another shape than its neurons": put("sites", 0, "shape", value=[4, 6, 7]),
    "site whose function is a number": put("sites", 0, "function", value=3),
    "site whose ceiling is text": put("sites", 0, "ceiling", value="6"),
    "site that may encode its input": put("sites", 0, "encodes_input", value=None),
    "sites missing": drop("sites"),
    "sites are text": put("sites", value="relu"),
    "neuron that is no site": put("sites", value=[]),
    "input shape empty": put("input_shape", value=[]),
    "input shape negative": put("input_shape", value=[-2, 6, 6]),
    "input shape text": put("input_shape", value="abc"),
    "input shape missing": drop("input_shape"),
    "method is a number": put("method", value=3),
    "method missing": drop("method"),
    "method without a name": put("method", value={"options": {}}),
    "method whose name is a list": put("method", "name", value=["qcfs"]),
    "method whose options are a list": put("method", "options", value=[1]),
    "refinements are a number": put("method", "refinements", value=3),
    "refinement that is text": put("method", "refinements", value=["bias_correction"]),
    "provenance is a number": put("provenance", value=3),
    "provenance with NaN": put("provenance", "note", value=float("nan")),
    "provenance nested deeply": put("provenance", "note", value=functools.reduce(lambda inner, _: [inner], range(100), 1)),
    "sizes are text": put("provenance", "sizes", value="all"),
    "sizes that are no pairs": put("provenance", "sizes", value=[[1, 2, 3]]),
    "provenance missing": drop("provenance"),
    "header is a list": lambda header, tensors: "[]",
    "header is a number": lambda header, tensors: "1",
    "header is null": lambda header, tensors: "null",
    "header is empty": lambda header, tensors: "",
    "header is code": lambda header, tensors: TOUCH,
    "header nested": lambda header, tensors: "[" * 100_000 + "]" * 100_000,
    "header with a long number": lambda header, tensors: '{"format": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused(case: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.safetensors"
    rewrite(saved, path, HOSTILE[case])
    with pytest.raises(CheckpointError) as caught:
        qs.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value).rstrip("\n") or "name" in case
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hostile.safetensors", "network.safetensors"]


def test_rewriting_alone_does_not_make_a_file_unreadable(saved: Path, plain: tuple[qs.SpikingNetwork, Tensor], tmp_path: Path) -> None:
    rewrite(saved, tmp_path / "same", lambda header, tensors: None)
    assert_same(plain[0], qs.load(tmp_path / "same"), plain[1])


@pytest.mark.parametrize("name", ["self", "torch", "getattr", "import", "print", "inf", "_operator_add"])
def test_node_names_that_mean_something_in_python(name: str, saved: Path, plain: tuple[qs.SpikingNetwork, Tensor], tmp_path: Path) -> None:
    """Such a name may be refused or replaced; it must not change what the network computes."""
    rewrite(saved, tmp_path / "a", rename_node(name))
    try:
        loaded = qs.load(tmp_path / "a")
    except CheckpointError:
        return
    with torch.no_grad():
        assert torch.equal(loaded(plain[1]), plain[0](plain[1]))


@pytest.mark.parametrize("pool", ["Conv2d", "Linear", "Evil", "Neuron", "AccumulatedMaxPool"])
def test_an_accumulated_pool_holds_a_max_pool(pool: str, pooled: tuple[qs.SpikingNetwork, Tensor], tmp_path: Path) -> None:
    pooled[0].save(tmp_path / "a")

    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        layer = next(layer for layer in header["layers"].values() if layer["type"] == "AccumulatedMaxPool")
        layer["arguments"]["pool"]["type"] = pool

    rewrite(tmp_path / "a", tmp_path / "b", change)
    with pytest.raises(CheckpointError):
        qs.load(tmp_path / "b")


def test_declared_sizes_cost_no_memory(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No constructor may allocate what the header merely claims, whatever device it names."""
    allocated: list[int] = []
    original = nn.init.kaiming_uniform_

    def watch(weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if weight.device.type != "meta":
            allocated.append(weight.numel())
        return original(weight, *args, **kwargs)

    monkeypatch.setattr(nn.init, "kaiming_uniform_", watch)
    for device in (None, "cpu"):
        change = put("layers", "head", "arguments", "dict", "in_features", value=100_000)
        if device:
            change = both(change, put("layers", "head", "arguments", "dict", "device", value=device))
        rewrite(saved, tmp_path / "a", change)
        with pytest.raises(CheckpointError):
            qs.load(tmp_path / "a")
    assert allocated == []


@pytest.mark.parametrize("version", [2, 3, 10**6])
def test_a_newer_format_is_refused_with_the_way_out(version: int, saved: Path, tmp_path: Path) -> None:
    # A newer format may hold anything else, so its version is judged before everything but the JSON.
    rewrite(saved, tmp_path / "a", lambda header, tensors: json.dumps({"format": version, "novelty": True}))
    with pytest.raises(CheckpointError, match=rf"{version}.*(newer|upgrade)"):
        qs.load(tmp_path / "a")


def test_an_altered_tensor_or_header_breaks_the_digest(saved: Path, tmp_path: Path) -> None:
    with safetensors.safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    swapped = {**tensors, "relu.leak": tensors["relu.amplitude"] * 0.5}
    renamed = {key.replace("head.bias", "head.bias2"): value for key, value in tensors.items()}
    for changed in (swapped, renamed, {**tensors, "more": torch.zeros(1)}):
        (tmp_path / "a").write_bytes(safetensors.torch.save(changed, metadata))
        with pytest.raises(CheckpointError, match="checksum"):
            qs.load(tmp_path / "a")
    for digest in ({}, {"sha256": ""}, {"sha256": metadata["sha256"].upper()}):
        (tmp_path / "a").write_bytes(safetensors.torch.save(tensors, {"quickspike": metadata["quickspike"], **digest}))
        with pytest.raises(CheckpointError, match="checksum"):
            qs.load(tmp_path / "a")


# Writing


def test_an_unwritable_path_is_a_clear_error(plain: tuple[qs.SpikingNetwork, Tensor], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "network.safetensors", tmp_path / "file" / "a" / "b", tmp_path / "folder"):
        with pytest.raises(OutputError, match="cannot write") as caught:
            plain[0].save(path)
        assert str(path) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert list((tmp_path / "folder").iterdir()) == []
    assert (tmp_path / "file").read_text() == "x"


def test_missing_folders_are_made_and_an_old_file_is_replaced(plain: tuple[qs.SpikingNetwork, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "network.safetensors"
    plain[0].save(path)
    plain[0].with_steps(2).save(str(path))
    assert qs.load(path).steps == 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("boom"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_old_file(
    failure: BaseException, saved: Path, plain: tuple[qs.SpikingNetwork, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def half(self: Path, data: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(data[: len(data) // 2])
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OutputError if isinstance(failure, OSError) else type(failure)):
            plain[0].with_steps(2).save(saved)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]
    assert_same(plain[0], qs.load(saved), plain[1])


def test_a_failure_of_the_serialiser_leaves_nothing(
    plain: tuple[qs.SpikingNetwork, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> bytes:
        raise RuntimeError("boom")

    monkeypatch.setattr(safetensors.torch, "save", fail)
    with pytest.raises(RuntimeError, match="boom"):
        plain[0].save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
