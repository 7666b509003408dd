"""`quickspike export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quickspike as qs
from cli_results import failed

pytest.importorskip("nir", reason="needs the package nir")


@pytest.fixture
def saved(spiking_digits: Any, tmp_path: Path) -> Path:
    path: Path = tmp_path / "digits.safetensors"
    spiking_digits("threshold_balancing").with_steps(4).save(path)
    return path


def test_nir_beside_the_network_with_what_is_lost(run: Any, saved: Path) -> None:
    found = run("export", str(saved), "--reader", "spikingjelly")
    assert "for spikingjelly 2.0: spikingjelly.activation_based.nir_exchange.import_from_nir(FILE, dt=1.0)" in found.out
    assert "not in the file: reset by subtraction" in found.out
    assert f"written: {saved.with_suffix('.nir')}" in found.out.replace("\n", "")
    assert qs.load_nir(saved.with_suffix(".nir")).steps == 4


def test_what_is_lost_is_measured(run: Any, saved: Path) -> None:
    arguments = ("export", str(saved), "--reader", "sinabs", "--allow-lossy", "--data", "digits", "--images", "100", "--json")
    found = json.loads(run(*arguments).out)
    (measured,) = found["measured"]
    assert measured["images"] == 100
    assert measured["own_accuracy"] > 90
    assert 0 < measured["agreement"] <= 100
    assert measured["spikes"] > 0
    assert found["losses"][0]["what"].split(":")[0] == "one spike in a step"


def test_strict_refuses(run: Any, saved: Path) -> None:
    refused = run("export", str(saved), "--strict")
    assert refused.code == 2
    assert "not written, because nir would not answer as this network does:\n- reset by subtraction" in refused.err
    assert not saved.with_suffix(".nir").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--allow-lossy"], "what is lost is measured on images; name --data"),
        (["--allow-lossy", "--strict"], "--strict refuses what --allow-lossy writes"),
        (["--reader", "lava"], "unknown NIR reader 'lava'"),
        (["--image-bits", "10", "--bits", "8"], "--image-bits goes with --bits or --integers, and not with --to nir"),
        (["--image-bits", "10", "--to", "torch"], "--image-bits goes with --bits or --integers"),
        (["--image-bits", "13", "--bits", "8", "--to", "torch"], "image_bits must be a whole number in [2, 12], got 13"),
    ],
)
def test_options_that_do_not_fit(run: Any, arguments: list[str], message: str, saved: Path) -> None:
    failed(run("export", str(saved), *arguments), message)


def test_torch_and_folder(run: Any, saved: Path, digits_test: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    images = digits_test[0][:5]
    wanted = qs.load(saved)(images)
    run("export", str(saved), "--to", "torch")
    assert torch.allclose(qs.load_program(saved.with_suffix(".pt2")).module()(images), wanted, atol=1e-5)
    run("export", str(saved), "--to", "folder", "--out", str(tmp_path / "shared"))
    assert torch.equal(qs.from_pretrained(tmp_path / "shared")(images), wanted)


def test_onnx(run: Any, saved: Path, digits_test: tuple[Tensor, Tensor]) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    images = digits_test[0][:5]
    run("export", str(saved), "--to", "onnx", "--bits", "8", "--integers")
    session = runtime.InferenceSession(str(saved.with_suffix(".onnx")), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    assert torch.allclose(found, qs.quantise(qs.load(saved)).network(images), atol=1e-5)


def test_tuning_under_the_other_reset(run: Any, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    run("tune", str(saved), "--data", "digits", "--epochs", "1", "--reset", "zero", "--out", str(out))
    assert all(neuron.to_zero for neuron in qs.load(out / "network.safetensors").neurons().values())


def test_a_card_with_the_figures_of_an_evaluation(run: Any, saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    folder = tmp_path / "shared"
    found = json.loads(
        run("evaluate", saved, "--data", "digits", "--steps", "2", "4", "--energy", "45nm_fp32", "--share", folder, "--json").out
    )
    card = (folder / "README.md").read_text()
    for steps in ("2", "4"):
        assert f"{found['accuracy'][steps]:.2f}" in card
    assert "45nm_fp32" in card
    assert qs.from_pretrained(folder).steps == 4


def test_an_upload_says_where_it_went(run: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Any] = []
    monkeypatch.setattr(
        "quickspike.hub.push_to_hub", lambda *arguments, **options: pushed.append((arguments, options)) or "https://x/commit"
    )
    assert "uploaded: https://x/commit" in run("evaluate", saved, "--data", "digits", "--push", "user/name").err
    (((snn, repository, report, energy), options),) = pushed
    assert (repository, energy, options) == ("user/name", (), {"dataset": "digits"})
    assert report.steps[-1] == snn.steps == 4
