"""NIR files: what is written, what is refused, and what comes back."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quickspike as qs
from nir_networks import NETWORKS, spiking
from quickspike.conversion import SpikingNetwork
from quickspike.errors import CheckpointError, ConversionError, DataError, OptionError, QuickspikeError, UnknownNameError
from quickspike.models import load_model
from quickspike.nir_chains import chained
from quickspike.nir_export import digest, export_nir, to_nir
from quickspike.nir_import import load_nir
from quickspike.nir_readers import READERS, play, reader_of
from quickspike.simulation import simulate

nir = pytest.importorskip("nir", reason="needs the package nir")
h5py = pytest.importorskip("h5py", reason="comes with the package nir")


def same(one: SpikingNetwork, other: SpikingNetwork, images: Tensor) -> None:
    """The same spikes at every site, and the same answers."""
    with torch.no_grad():
        expected, found = simulate(one, images), simulate(other, images)
    assert {site: counts.shape for site, counts in expected.spikes.items()} == {s: c.shape for s, c in found.spikes.items()}
    assert sum(int(counts.sum()) for counts in expected.spikes.values()) > 0
    for site, counts in expected.spikes.items():
        assert torch.equal(counts, found.spikes[site]), site
    assert torch.allclose(expected.logits, found.logits, atol=1e-5)


@pytest.mark.parametrize("method", ["threshold_balancing", "potential_init", "diet_snn", "ultra_low_latency"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_gives_the_network_again(name: str, method: str, tmp_path: Path) -> None:
    snn, images = spiking(name, method)
    if method == "diet_snn":
        for neuron in snn.neurons().values():
            neuron.leak.fill_(0.9)
    export_nir(snn, tmp_path / "a.nir")
    again = load_nir(tmp_path / "a.nir")
    assert again.steps == 6
    assert again.method == snn.method
    assert [site.name for site in again.sites] == [site.name for site in snn.sites]
    same(snn, again, images)
    same(snn.with_steps(3), load_nir(tmp_path / "a.nir", steps=3), images)


def test_under_its_reset_nothing_of_it_is_lost(tmp_path: Path) -> None:
    snn, images = spiking("shortcuts")
    hard = snn.with_reset("zero")
    for neuron in hard.neurons().values():
        neuron.initial.fill_(0.0)
    exported = export_nir(hard, tmp_path / "a.nir", "spikingjelly", strict=True)
    assert exported.losses == ()
    with torch.no_grad():
        wanted = hard.outputs(images)
    assert torch.allclose(play(exported.graph, images, 6, "spikingjelly").outputs, wanted, atol=1e-5)
    assert not torch.allclose(wanted, snn.outputs(images), atol=1e-3)


@pytest.mark.parametrize("options", [{"synchronous": True}, {"signed": True}, {"granularity": "channel"}])
def test_what_nir_has_no_word_for_comes_back_too(options: dict[str, Any], tmp_path: Path) -> None:
    snn, images = spiking("shortcuts", **options)
    export_nir(snn, tmp_path / "a.nir")
    same(snn, load_nir(tmp_path / "a.nir"), images)


def ours(snn: SpikingNetwork, images: Tensor, steps: int, reset: str, first: float = 0.0) -> Tensor:
    """Outputs `[T, B, K]` step by step, with neurons written out here: v(0) = 0 and fire at m > theta, m >= theta."""
    network = snn.with_steps(1)
    potentials: dict[str, Tensor] = {}

    def hook(name: str, neuron: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            theta, leak = neuron.bounded()
            m = leak * potentials.get(name, torch.zeros_like(x)) + x + first * theta
            spikes = (m > theta).to(x)
            potentials[name] = m - spikes * theta if reset == "subtract" else m * (1 - spikes)
            return spikes * (neuron.amplitude * theta if neuron.scaled else neuron.amplitude)

        return run

    for name, neuron in network.neurons().items():
        neuron.forward = hook(name, neuron)
    with torch.no_grad():
        return torch.stack([network.network(images) for _ in range(steps)])


@pytest.mark.parametrize("name", NETWORKS)
def test_played_by_the_specification_it_is_the_network_with_its_reset(name: str) -> None:
    snn, images = spiking(name, steps=6)
    played = play(to_nir(snn).graph, images, 6)
    wanted = ours(snn, images, 6, "zero")
    assert float(played.outputs.std()) > 0
    assert torch.allclose(played.outputs, wanted, atol=1e-5)
    # And not that with the other reset, which is told apart here.
    assert not torch.allclose(played.outputs, ours(snn, images, 6, "subtract"), atol=1e-3)


def test_potentials_to_begin_with_come_in_as_biases() -> None:
    snn, images = spiking("shortcuts", "potential_init", steps=4)
    assert all(float(neuron.initial) == 0.5 for neuron in snn.neurons().values())
    played = play(to_nir(snn, initial="bias").graph, images, 4)
    assert torch.allclose(played.outputs, ours(snn, images, 4, "zero", first=0.5 / 4), atol=1e-5)
    assert not torch.allclose(played.outputs, ours(snn, images, 4, "zero"), atol=1e-3)


@pytest.mark.parametrize("reader", sorted(set(READERS) - {"nir"}))
@pytest.mark.parametrize("name", ["chain", "shortcuts"])
def test_readers_that_add_nothing_up_get_chains_that_give_the_same(name: str, reader: str) -> None:
    snn, images = spiking(name)
    graph = to_nir(snn, reader).graph
    incoming = [b for _, b in graph.edges]
    assert len(incoming) == len(set(incoming))
    summed = play(to_nir(snn).graph, images, 6, reader).outputs
    assert torch.allclose(play(graph, images, 6, reader).outputs.flatten(2), summed, atol=1e-5)


CHAINS: dict[str, tuple[str, dict[str, Any]]] = {
    "potential_init": ("potential_init", {}),
    "channel": ("potential_init", {"granularity": "channel"}),
    "neuron": ("potential_init", {"initial": "uniform"}),
    "strict": ("ultra_low_latency", {}),
    "windows": ("threshold_balancing", {"synchronous": True}),
}


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("reader", sorted(set(READERS) - {"nir"}))
def test_chains_come_back_as_the_network_that_they_were_made_from(reader: str, kind: str, tmp_path: Path) -> None:
    method, options = CHAINS[kind]
    snn, images = spiking("shortcuts", method, **options)
    if kind == "channel":
        neuron = next(iter(snn.neurons().values()))
        neuron.initial = nn.Parameter(torch.linspace(0, 0.9, 6).reshape(-1, 1, 1), False)
    export_nir(snn, tmp_path / "a.nir", reader)
    again = load_nir(tmp_path / "a.nir")
    with torch.no_grad():
        expected, found = simulate(snn, images), simulate(again, images)
    # Handed-on spikes of a whole window come at other steps of the next one.
    some = slice(-1, None) if kind == "windows" else slice(None)
    assert torch.allclose(expected.logits[some], found.logits[some].flatten(2), atol=1e-5)
    for site, counts in expected.spikes.items():
        assert torch.equal(found.spikes[site][:, : counts.shape[1]].flatten(1), counts.flatten(1)), site


def test_a_sum_that_is_no_chain_is_refused() -> None:
    snn, _ = spiking("kernels")
    with pytest.raises(ConversionError, match=r"snntorch 1\.0 adds nothing up, and what comes to \S+ \("):
        to_nir(snn, "snntorch")


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_the_networks_of_the_papers_are_written(name: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    model = load_model(name).train()
    with torch.no_grad():
        model(torch.randn(16, 3, 32, 32))
    snn = qs.convert(model.eval(), images, steps=2)
    exported = to_nir(snn)
    assert len(exported.nodes) == len(snn.sites)
    played = play(exported.graph, images, 2)
    assert torch.allclose(played.outputs, ours(snn, images, 2, "zero"), atol=1e-4)


# What is lost


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    snn, _ = spiking("chain")
    with torch.no_grad():
        cast(Any, snn.network.get_submodule("fc1")).weight[3, 4] = torch.nan
    with pytest.raises(ConversionError, match="fc1: weights hold NaN or infinite values"):
        export_nir(snn, tmp_path / "a.nir")
    assert not list(tmp_path.iterdir())


def test_losses_are_those_of_network_and_reader() -> None:
    snn, _ = spiking("chain", "potential_init")

    def lost(reader: str, **options: Any) -> list[str]:
        return [loss.what.split(":")[0] for loss in to_nir(snn, reader, **options).losses]

    assert lost("nir") == ["reset by subtraction", "potentials to begin with", "firing at m >= theta"]
    assert lost("spikingjelly") == ["reset by subtraction", "potentials to begin with"]
    assert lost("sinabs") == ["one spike in a step", "potentials without a lower bound", "potentials to begin with"]
    assert lost("sinabs", initial="bias")[-1] == "potentials to begin with come in bit by bit, as biases"
    assert "spikes that are taken back" in [loss.what for loss in to_nir(spiking("chain", signed=True)[0]).losses]
    assert "layers that wait for whole windows" in [loss.what for loss in to_nir(spiking("chain", synchronous=True)[0]).losses]
    shown = str(to_nir(snn).losses[0])
    assert shown == (
        "reset by subtraction: a spike sets the potential to 0 there (3 sites: relu, relu_2, relu_3); "
        "tune under that reset (`quickspike tune --reset zero`), or take reader=sinabs, which subtracts"
    )


def test_strict_refuses_and_leaves_no_file(tmp_path: Path) -> None:
    snn, _ = spiking("chain")
    with pytest.raises(ConversionError, match="not written, because sinabs would not answer as this network does:\n- one spike in a step"):
        export_nir(snn, tmp_path / "a.nir", "sinabs", strict=True)
    assert not list(tmp_path.iterdir())


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(nn.functional.relu(self.conv(x)), 2)
        return self.fc(nn.functional.interpolate(x, scale_factor=2).mean((2, 3)))


def test_every_part_without_a_node_is_named() -> None:
    snn = qs.convert(Pooled(), torch.randn(4, 3, 10, 10), steps=2)
    with pytest.raises(ConversionError, match="NIR has no nodes for this network:\n- ") as refused:
        to_nir(snn)
    assert str(refused.value).splitlines()[1:-1] == ["- max_pool2d_max_pool2d: MaxPool2d"]
    assert str(refused.value).splitlines()[-1].startswith("ways out: average pooling instead of max-pooling")


def test_names_that_do_not_exist() -> None:
    snn, _ = spiking("chain")
    with pytest.raises(UnknownNameError, match="unknown NIR reader 'sinab'; did you mean 'sinabs'"):
        to_nir(snn, "sinab")
    with pytest.raises(OptionError, match="made for the fused engine"):
        to_nir(qs.accelerate(snn, "fused"))
    with pytest.raises(OptionError, match="initial must be one of 'left out', 'bias', got 'left-out'"):
        to_nir(snn, initial=cast(Any, "left-out"))


def test_potentials_of_single_neurons_are_no_bias() -> None:
    snn, _ = spiking("chain", "potential_init", initial="uniform")
    with pytest.raises(ConversionError, match="potentials of single neurons to begin with are no bias; take initial='left out'"):
        to_nir(snn, initial="bias")


class Shrinking(nn.Module):
    """Past the shortcut the map shrinks and grows again, so that places at its edge are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=2)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.stem(x))
        return self.fc(nn.functional.relu(self.conv2(nn.functional.relu(self.conv1(x))) + x).mean((2, 3)))


def test_maps_that_lose_their_edges_hand_nothing_on() -> None:
    snn = qs.convert(Shrinking(), torch.randn(4, 3, 8, 8), steps=2)
    with pytest.raises(ConversionError, match="maps that stay as large"):
        to_nir(snn, "spikingjelly")
    assert to_nir(snn).graph


def test_chains_have_an_end() -> None:
    snn, _ = spiking("shortcuts")
    with pytest.raises(ConversionError, match="networks with shortcuts are written for at most 1000 steps, got 1001"):
        to_nir(snn.with_steps(1001), "sinabs")
    assert to_nir(spiking("chain")[0].with_steps(1001), "sinabs").graph


@pytest.mark.parametrize("reader", ["norse", "snntorch", "spikingjelly"])
def test_leaky_neurons_hand_spikes_on_too(reader: str) -> None:
    snn, images = spiking("shortcuts", "diet_snn")
    for neuron in snn.neurons().values():
        neuron.leak.fill_(0.6)
        neuron.threshold.mul_(0.05)
    summed = play(to_nir(snn).graph, images, 6, "nir")
    if reader != "norse":
        assert torch.allclose(play(to_nir(snn, reader).graph, images, 6, reader).outputs.flatten(2), summed.outputs, atol=1e-4)
        return
    # By norse's rules currents of leaky neurons come in as 1 - leak, in a graph with sums too.
    graph = to_nir(snn).graph
    for node in graph.nodes.values():
        if hasattr(node, "tau"):
            node.tau = node.tau * 10  # steps of 1 ms
    played = play(graph, images, 6, "norse")
    found = play(to_nir(snn, "norse").graph, images, 6, "norse")
    assert float(played.spikes[max(played.spikes)].sum()) > 0
    assert torch.allclose(found.outputs.flatten(2), played.outputs, atol=1e-4)


class Flattened(nn.Module):
    """Neurons right behind a flattening, of which one leaves an axis."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.conv, self.fc, self.whole = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64 if whole else 8, 2), whole

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(nn.functional.relu(x.flatten(1) if self.whole else x.flatten(1, 2)))


@pytest.mark.parametrize(("whole", "reader"), [(True, "norse"), (True, "snntorch"), (False, "nir")])
def test_flattenings_that_a_reader_does_not_know_are_named(whole: bool, reader: str) -> None:
    snn = qs.convert(Flattened(whole), torch.randn(4, 3, 8, 8), steps=2)
    with pytest.raises(ConversionError, match="NIR has no nodes for this network:\n- "):
        to_nir(snn, reader)


def test_no_folder_of_this_machine_is_in_a_file(tmp_path: Path) -> None:
    snn, _ = spiking("shortcuts")
    assert str(Path(__file__).parent) in snn.sites[0].source or "nir_networks.py" in snn.sites[0].source
    text = to_nir(snn).graph.metadata["quickspike"]
    assert "nir_networks.py" in text
    assert "/" not in text.split("nir_networks.py")[0].rsplit('"', 1)[1]


def test_what_is_played_is_checked_first() -> None:
    snn, images = spiking("chain")
    graph = to_nir(snn).graph
    with pytest.raises(DataError, match=r"takes images of shape \[B, 3, 16, 16\], got \[6, 3, 8, 16\]"):
        play(graph, images[:, :, :8], 2)
    with pytest.raises(OptionError, match="steps must be >= 1, got 0"):
        play(graph, images, 0)


def test_leaky_maps_are_not_for_sinabs() -> None:
    snn, _ = spiking("chain")
    next(iter(snn.neurons().values())).leak.fill_(0.5)
    with pytest.raises(ConversionError, match=r"relu: leaky neurons on a map, on which sinabs 3\.1 fails"):
        to_nir(snn, "sinabs")


# Files


def test_bytes_are_always_the_same(tmp_path: Path) -> None:
    snn, _ = spiking("shortcuts")
    for name in ("a", "b"):
        export_nir(snn, tmp_path / name, "sinabs")
    written = (tmp_path / "a").read_bytes()
    assert written == (tmp_path / "b").read_bytes()
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_nir import write; write({str(tmp_path / 'c')!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "c").read_bytes() == written


def write(path: str) -> None:
    export_nir(spiking("shortcuts")[0], path, "sinabs")


def test_altered_files_are_refused(tmp_path: Path) -> None:
    snn, _ = spiking("chain")
    path = tmp_path / "a.nir"
    export_nir(snn, path)
    whole = path.read_bytes()
    for end in (0, 10, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match="truncated, altered, or no NIR file"):
            load_nir(path)
    path.write_bytes(whole)
    graph = nir.read(path)
    (name,) = (name for name in graph.nodes if name.endswith("fc1"))
    graph.nodes[name].weight[3, 4] += 1e-6
    nir.write(path, graph)
    with pytest.raises(CheckpointError, match="the checksum does not match"):
        load_nir(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_nir(tmp_path / "b.nir")


@pytest.mark.parametrize("version", ['"1"', "null", "0"])
def test_a_format_that_is_none_is_refused(version: str, tmp_path: Path) -> None:
    graph = to_nir(spiking("chain")[0]).graph
    graph.metadata["quickspike"] = graph.metadata["quickspike"].replace('"format": 1', f'"format": {version}')
    nir.write(tmp_path / "a.nir", graph)
    with pytest.raises(CheckpointError, match="names no format version; the file was altered, export the network again"):
        load_nir(tmp_path / "a.nir")


def test_metadata_nested_too_deeply_are_refused(tmp_path: Path) -> None:
    graph = to_nir(spiking("chain")[0]).graph
    graph.metadata["quickspike"] = "[" * 100_000
    nir.write(tmp_path / "a.nir", graph)
    with pytest.raises(CheckpointError, match="its metadata is damaged"):
        load_nir(tmp_path / "a.nir")


def altered(tmp_path: Path, change: Any) -> Path:
    """A file that was changed by h5py and that nothing seals."""
    export_nir(spiking("chain")[0], tmp_path / "a.nir")
    with h5py.File(tmp_path / "a.nir", "r+") as file:
        del file["node/metadata"]
        change(file)
    return tmp_path / "a.nir"


@pytest.mark.parametrize("how", [{}, {"chunks": (1024,), "compression": "gzip"}])
def test_arrays_that_are_only_said_to_be_huge_cost_no_memory(how: dict[str, Any], tmp_path: Path) -> None:
    def change(file: Any) -> None:
        (name,) = (name for name in file["node/nodes"] if name.endswith("fc1"))
        del file[f"node/nodes/{name}/bias"]
        file.create_dataset(f"node/nodes/{name}/bias", (2**27,), "f4", **how)

    path = altered(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"its arrays would have 5\d* bytes"):
        load_nir(path, steps=2)


@pytest.mark.parametrize("link", [h5py.SoftLink("/node"), h5py.ExternalLink("other.nir", "/node")])
def test_parts_that_lie_elsewhere_are_refused(link: Any, tmp_path: Path) -> None:
    path = altered(tmp_path, lambda file: file.__setitem__("node/elsewhere", link))
    with pytest.raises(CheckpointError, match="elsewhere lies elsewhere"):
        load_nir(path, steps=2)


def test_groups_that_hold_themselves_are_refused(tmp_path: Path) -> None:
    path = altered(tmp_path, lambda file: file.__setitem__("node/again", file["node"]))
    with pytest.raises(CheckpointError, match="nested too deeply"):
        load_nir(path, steps=2)


def test_a_file_for_many_steps_is_read_without_simulating_them(tmp_path: Path) -> None:
    path = altered(tmp_path, lambda file: None)
    started = time.process_time()
    assert load_nir(path, steps=65536).steps == 65536
    assert time.process_time() - started < 5


@pytest.mark.parametrize(("key", "value"), [("reader", "nobody"), ("reader", 3), ("steps", 10**9), ("method", 3), ("provenance", [1])])
def test_metadata_that_an_attacker_sealed_are_refused_with_the_file(key: str, value: Any, tmp_path: Path) -> None:
    graph = to_nir(spiking("chain")[0]).graph
    metadata = json.loads(graph.metadata["quickspike"]) | {key: value}
    graph.metadata["quickspike"] = json.dumps(metadata | {"sha256": digest(graph, metadata)})
    nir.write(tmp_path / "a.nir", graph)
    with pytest.raises(QuickspikeError) as caught:
        load_nir(tmp_path / "a.nir")
    assert str(tmp_path / "a.nir") in str(caught.value)


def test_provenance_that_json_does_not_hold_is_refused() -> None:
    snn, _ = spiking("chain")
    snn.provenance["where"] = Path()
    with pytest.raises(ConversionError, match="holds something that JSON does not"):
        to_nir(snn)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    graph = to_nir(spiking("chain")[0]).graph
    graph.metadata["quickspike"] = graph.metadata["quickspike"].replace('"format": 1', '"format": 3')
    nir.write(tmp_path / "a.nir", graph)
    with pytest.raises(CheckpointError, match="metadata of format 3, this quickspike reads up to 2; upgrade quickspike"):
        load_nir(tmp_path / "a.nir")


# Files from elsewhere


def foreign(tmp_path: Path, *nodes: Any) -> Path:
    nir.write(tmp_path / "foreign.nir", nir.NIRGraph.from_list(*nodes))
    return tmp_path / "foreign.nir"


@pytest.mark.parametrize("reader", sorted(READERS))
def test_a_file_from_elsewhere_is_what_its_reader_takes_it_for(reader: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = np.float32(torch.rand(4, 3).numpy()), np.float32(torch.randn(2, 4).numpy())
    neurons = nir.IF(r=np.full(4, 2, np.float32), v_threshold=np.float32([1, 2, 0.7, 1.3]))
    path = foreign(tmp_path, nir.Linear(first), neurons, nir.Affine(second, np.float32([1, -1])))
    with pytest.raises(OptionError, match=r"does not say for how many steps it was made; name steps="):
        load_nir(path)
    snn = load_nir(path, steps=5, reader=reader)
    # Too little for two spikes in a step, and nothing negative: what our neurons do not have.
    x = torch.rand(7, 3) * 0.3
    played = play(nir.read(path), x, 5, reader)
    with torch.no_grad():
        found = simulate(snn, x)
    assert 0 < float(played.spikes["if"].sum()) < 5 * 28
    assert torch.equal(played.spikes["if"], found.spikes[next(iter(found.spikes))].float())
    assert torch.allclose(played.logits, found.logits, atol=1e-5)


def test_what_our_neurons_do_not_have_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = nir.Linear(np.eye(2, dtype=np.float32))
    path = foreign(tmp_path, one, nir.IF(r=np.ones(2), v_threshold=np.ones(2)), one)
    load_nir(path, steps=2)
    assert caplog.text == ""
    load_nir(path, steps=2, reader="sinabs")
    assert "neurons fire once in a step at most here, and have no lowest potential; sinabs has them otherwise" in caplog.text


def test_names_that_become_equal_stay_apart(tmp_path: Path) -> None:
    layers = {name: nir.Linear(np.eye(2, dtype=np.float32) * factor) for name, factor in (("fc-1", 2), ("fc_1", 3), ("float", 4))}
    neurons = nir.IF(r=np.ones(2, np.float32), v_threshold=np.ones(2, np.float32))
    nodes = {"input": nir.Input(np.array([2])), **layers, "forward": neurons, "output": nir.Output(np.array([2]))}
    names = list(nodes)
    order = ["input", "fc-1", "forward", "fc_1", "float", "output"]
    assert sorted(names) == sorted(order)
    nir.write(tmp_path / "a.nir", nir.NIRGraph(nodes, list(itertools.pairwise(order))))
    x = torch.rand(5, 2)
    snn = load_nir(tmp_path / "a.nir", steps=4)
    assert torch.allclose(snn(x), play(nir.read(tmp_path / "a.nir"), x, 4).logits[-1])


class Repeated(nn.Module):
    """A site with the name that a layer of the reading would get, and an image that is added to spikes' currents."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)
        self.repeat, self.relu = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv2(self.repeat(self.conv1(x))) + x).mean((2, 3)))


def test_names_of_sites_are_theirs(tmp_path: Path) -> None:
    images = torch.randn(6, 3, 8, 8)
    snn = qs.convert(Repeated(), images, steps=4)
    export_nir(snn, tmp_path / "a.nir")
    same(snn, load_nir(tmp_path / "a.nir"), images)


def test_leaky_neurons_from_elsewhere(tmp_path: Path) -> None:
    ones = np.ones(3, np.float32)
    neurons = nir.LIF(tau=ones * 2e-4, r=ones * 2, v_leak=ones * 0, v_threshold=ones)
    snn = load_nir(foreign(tmp_path, nir.Linear(np.eye(3, dtype=np.float32)), neurons, nir.Linear(np.eye(3, dtype=np.float32))), steps=4)
    (neuron,) = snn.neurons().values()
    # dt/tau = 1/2: half of the potential stays, and a current of 1 comes in with r dt/tau = 1.
    assert float(neuron.leak) == 0.5
    assert float(neuron.threshold) == 1


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (lambda one: [nir.Linear(one), nir.Threshold(np.ones(2, np.float32)), nir.Linear(one)], "a node Threshold has no counterpart here"),
        (lambda one: [nir.Linear(one), nir.Linear(one)], "the output does not depend on any neuron"),
        (
            lambda one: [nir.Linear(one), nir.IF(r=np.ones(2), v_threshold=np.ones(2), v_reset=np.ones(2)), nir.Linear(one)],
            "reset elsewhere than at 0",
        ),
    ],
)
def test_what_has_no_counterpart_is_named(nodes: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=reason):
        load_nir(foreign(tmp_path, *nodes(np.eye(2, dtype=np.float32))), steps=2)


def test_cycles_are_refused(tmp_path: Path) -> None:
    one, neurons = np.eye(2, dtype=np.float32), nir.IF(r=np.ones(2), v_threshold=np.ones(2))
    nodes = {"input": nir.Input(np.array([2])), "a": nir.Linear(one), "b": neurons, "output": nir.Output(np.array([2]))}
    graph = nir.NIRGraph(nodes, [("input", "b"), ("b", "a"), ("a", "b"), ("b", "output")])
    nir.write(tmp_path / "a.nir", graph)
    with pytest.raises(ConversionError, match="has a cycle through a, b"):
        load_nir(tmp_path / "a.nir", steps=2)


def test_chains_stop_at_what_they_cannot_hand_on() -> None:
    shape = np.array([1, 2, 2])
    conv = nir.Conv2d((2, 2), np.ones((1, 1, 1, 1), np.float32), 1, 0, 1, 1, np.zeros(1, np.float32))
    nodes = {"input": nir.Input(shape), "a": conv, "b": conv, "output": nir.Output(shape)}
    edges = [("input", "a"), ("input", "b"), ("a", "output"), ("b", "output")]
    with pytest.raises(ConversionError, match=r"what comes to output \(a, b\) is no chain"):
        chained(nodes, edges, reader_of("sinabs"), 4)
