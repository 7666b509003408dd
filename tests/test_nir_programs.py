"""The programs that read NIR, where they are installed: each gives what its rules in `nir_readers` say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nir_networks import spiking
from quickspike.errors import OptionError
from quickspike.nir_export import export_nir, to_nir
from quickspike.nir_programs import run_in
from quickspike.nir_readers import READERS, play
from quickspike.simulation import simulate

nir = pytest.importorskip("nir", reason="needs the package nir")


def installed(reader: str) -> None:
    snn, images = spiking("chain", steps=1)
    try:
        run_in(reader, to_nir(snn, reader).graph, images, 1)
    except OptionError as error:
        # Any other refusal is a fault of ours.
        assert "is not installed" in str(error), error
        pytest.skip(f"needs the program: {error}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["chain", "shortcuts"])
@pytest.mark.parametrize("reader", sorted(set(READERS) - {"nir"}))
def test_a_file_runs_in_its_reader_as_it_is_played(reader: str, name: str, tmp_path: Path) -> None:
    installed(reader)
    snn, images = spiking(name)
    exported = export_nir(snn, tmp_path / "a.nir", reader)
    graph = nir.read(tmp_path / "a.nir")
    found = run_in(reader, graph, images, 6)
    played = play(graph, images, 6, reader).outputs.flatten(2)
    assert float(played.std()) > 0
    assert torch.allclose(found, played, atol=1e-5)
    assert exported.losses


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", ["norse", "snntorch", "spikingjelly"])
def test_leaks_are_read_as_they_are_meant(reader: str) -> None:
    installed(reader)
    snn, images = spiking("chain", "diet_snn")
    for neuron in snn.neurons().values():
        neuron.leak.fill_(0.8)
        neuron.threshold.mul_(0.1)
    graph = to_nir(snn, reader).graph
    found = play(graph, images, 6, reader)
    played = found.outputs.flatten(2)
    assert all(float(counts.sum()) > 0 for counts in found.spikes.values())
    assert torch.allclose(run_in(reader, graph, images, 6), played, atol=1e-4)
    for neuron in snn.neurons().values():
        neuron.leak.fill_(1.0)
    assert not torch.allclose(played, play(to_nir(snn, reader).graph, images, 6, reader).outputs.flatten(2), atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_sinabs_gives_our_spikes_where_its_differences_do_not_matter() -> None:
    """No potential below -theta, none that fires twice in a step: then nothing is lost on the way there."""
    installed("sinabs")
    snn, images = spiking("shortcuts")
    with torch.no_grad():
        images = images.abs()
        for parameter in (p for name, p in snn.network.named_parameters() if name.endswith(("weight", "bias"))):
            parameter.abs_()
        for neuron in snn.neurons().values():
            neuron.initial.fill_(0.0)
            neuron.threshold.fill_(3.0)
            neuron.amplitude.fill_(0.2)
    graph = to_nir(snn, "sinabs").graph
    found = run_in("sinabs", graph, images, 6)
    with torch.no_grad():
        wanted = simulate(snn, images)
    assert sum(int(counts.sum()) for counts in wanted.spikes.values()) > 0
    assert torch.allclose(found.mean(0), wanted.logits[-1], atol=1e-5)


def test_the_specification_is_no_program() -> None:
    snn, images = spiking("chain")
    with pytest.raises(OptionError, match="nir is a specification and no program; run one of norse, sinabs, snntorch, spikingjelly"):
        run_in("nir", to_nir(snn).graph, images, 2)
