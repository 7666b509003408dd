"""From pictures to inputs: size, part, colours, mean and deviation; what pretrained networks ask for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

import quickspike as qs
from quickspike import data as data_module
from quickspike.cli import main
from quickspike.cli_options import DataOptions
from quickspike.data import Images, load_data
from quickspike.errors import CheckpointError, DataError, UnknownNameError
from quickspike.models import ModelError, load_model, preprocessing_of
from quickspike.preprocessing import IMAGENET, Preprocessing

PLAIN = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def pictures(count: int = 3, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def images(preprocessing: Preprocessing, **size: int) -> Tensor:
    made = Images(pictures(**size), np.zeros(3, dtype=np.int64), preprocessing, "here")
    return torch.stack([image for image, _ in made.__getitems__([0, 1, 2])])


def folders(path: Path, classes: int = 3) -> None:
    for split in ("train", "val"):
        for name in range(classes):
            (path / split / f"n{name}").mkdir(parents=True)
            for index, picture in enumerate(pictures(3, 80, 96)):
                Image.fromarray(picture).save(path / split / f"n{name}" / f"{index}.png")


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_memory_and_files_are_prepared_alike(interpolation: str, tmp_path: Path) -> None:
    wanted = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 12, 10, interpolation, bgr=True)
    folders(tmp_path, 2)
    from_file = load_data(f"imagefolder:{tmp_path}", preprocessing=wanted).train.dataset[0][0]
    in_memory = Images(pictures(3, 80, 96), np.zeros(3, dtype=np.int64), wanted, "here")[0][0]
    assert from_file.shape == in_memory.shape == (3, 10, 10)
    # PIL rounds after each axis.
    assert float((from_file - in_memory).abs().max()) < 0.02


def test_every_step_is_done_in_its_order() -> None:
    plain = images(PLAIN)
    assert torch.equal(images(dataclasses.replace(PLAIN, bgr=True)), plain.flip(1))
    assert torch.equal(images(dataclasses.replace(PLAIN, crop=10)), plain[:, :, 5:15, 10:20])
    smaller = functional.resize(torch.from_numpy(pictures().transpose(0, 3, 1, 2)), [10], antialias=True) / 255
    assert torch.equal(images(dataclasses.replace(PLAIN, resize=10)), smaller)
    assert smaller.shape == (3, 3, 10, 15)
    both = images(dataclasses.replace(PLAIN, resize=10, crop=8))
    assert torch.equal(both, smaller[:, :, 1:9, 4:12])
    blue_first = images(Preprocessing((0.1, 0.2, 0.3), (0.5, 1.0, 2.0), bgr=True))
    assert torch.allclose(blue_first[:, 0], (plain[:, 2] - 0.1) / 0.5)


def test_many_pictures_are_resized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = images(dataclasses.replace(PLAIN, resize=12))
    monkeypatch.setattr("quickspike.preprocessing.PART", 1)
    assert torch.equal(images(dataclasses.replace(PLAIN, resize=12)), whole)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"resize": -1}, "resize and crop must be"),
        ({"crop": 2.5}, "resize and crop must be"),
        ({"resize": 10, "crop": 11}, "crop=11 is more than resize=10 leaves"),
        ({"bgr": "no"}, "bgr must be true or false"),
        ({"interpolation": "area"}, "nearest, bilinear, bicubic"),
        ({"std": (0.0,)}, "std > 0"),
        ({"mean": (float("nan"),)}, "finite"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        dataclasses.replace(PLAIN, **changes)


def test_a_part_larger_than_the_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="crop=21 is more than pictures of 20 x 30"):
        images(dataclasses.replace(PLAIN, crop=21))
    folders(tmp_path, 1)
    with pytest.raises(DataError, match="crop=81 is more than pictures of 80 x 96"):
        load_data(f"imagefolder:{tmp_path}", preprocessing=dataclasses.replace(PLAIN, crop=81)).train[0]


def test_it_survives_a_file() -> None:
    full = Preprocessing((0.1,), (0.2,), 256, 224, "bicubic", True)
    assert Preprocessing.from_json(dataclasses.asdict(full)) == full
    assert Preprocessing.from_json({"mean": [0.1], "std": [0.2]}) == Preprocessing((0.1,), (0.2,))


def test_imagenet_is_a_folder_with_its_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path)
    with pytest.raises(DataError, match=r"holds 3 classes, ImageNet has 1000; for others take imagefolder:"):
        load_data("imagenet", tmp_path)
    with pytest.raises(DataError, match="imagenet needs --data-dir"):
        load_data("imagenet")
    monkeypatch.setattr(data_module, "CLASSES", 3)
    found = load_data("imagenet", tmp_path, workers=1)
    assert (found.name, found.size("test"), found.class_names, found.preprocessing) == ("imagenet", 9, ("n0", "n1", "n2"), IMAGENET)
    batch, labels = next(iter(found.loader("test", batch_size=9)))
    assert batch.shape == (9, 3, 224, 224)
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_what_pretrained_networks_ask_for() -> None:
    assert preprocessing_of("torchvision:squeezenet1_1") == IMAGENET
    assert preprocessing_of("torchvision:efficientnet_b1") == dataclasses.replace(IMAGENET, resize=255, crop=240)
    assert preprocessing_of("torchvision:fcn_resnet50") == dataclasses.replace(IMAGENET, resize=520, crop=0)
    timm = preprocessing_of("timm:efficientnet_lite0")
    assert (timm.resize, timm.crop, timm.interpolation) == (256, 224, "bicubic")
    assert timm.mean == pytest.approx((0.485, 0.456, 0.406))
    for name in ("fast_cnn", "networks.py:net"):
        with pytest.raises(ModelError, match="no pretrained weights"):
            preprocessing_of(name)
        with pytest.raises(ModelError, match="no pretrained weights"):
            load_model(name, "pretrained")
    for name in ("torchvision:resnet81", "timm:resnet81"):
        with pytest.raises(UnknownNameError):
            load_model(name, "pretrained")


def test_pretrained_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **more: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", offline)
    with pytest.raises(ModelError, match="torchvision:squeezenet1_1 cannot be had: no route to host"):
        load_model("torchvision:squeezenet1_1", "pretrained")


def test_pretrained_weights_come_with_their_preprocessing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path / "pictures")
    trained = load_model("torchvision:squeezenet1_1", seed=5)
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda self, **more: trained.state_dict())
    loaded = load_model("torchvision:squeezenet1_1", "pretrained")
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in loaded.state_dict().items())
    place = f"imagefolder:{tmp_path / 'pictures'}"
    out = str(tmp_path / "network.safetensors")
    main(
        [
            "convert",
            "torchvision:squeezenet1_1",
            "--weights",
            "pretrained",
            "--data",
            place,
            "--center-crop",
            "64",
            "--steps",
            "2",
            "--out",
            out,
        ]
    )
    snn = qs.load(out)
    assert Preprocessing.from_json(snn.provenance["preprocessing"]) == dataclasses.replace(IMAGENET, crop=64)
    assert snn.input_shape == (3, 64, 64)
    report = tmp_path / "report.json"
    main(["evaluate", out, "--data", place, "--out", str(report)])
    assert '"samples": 9' in report.read_text()


def test_an_old_network_keeps_its_statistics(
    tmp_path: Path, digits_source: Any, digits_calibration: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    snn = qs.convert(digits_source, digits_calibration, steps=2)
    rates = []
    for name, mean in (("old", 0.3053), ("other", 0.9)):
        snn.provenance["statistics"] = {"mean": [mean], "std": [0.3758]}
        snn.save(tmp_path / name)
        main(["evaluate", str(tmp_path / name), "--data", "digits", "--images", "50", "--out", str(tmp_path / "report.json")])
        rates.append(json.loads((tmp_path / "report.json").read_text())["rates"])
    report = qs.evaluate(snn, load_data("digits").loader("test", limit=50), device="cpu")
    assert rates[0] == report.rates != rates[1]
    snn.provenance["preprocessing"] = {"mean": [0.3053], "std": [0.3758], "crop": -3}
    snn.save(tmp_path / "bad.safetensors")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "bad.safetensors"), "--data", "digits"])
    assert "the network's own preprocessing is unusable" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [{"resize": 2**14 + 1}, {"crop": 10**9}])
def test_pictures_larger_than_memory_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"resize and crop must be numbers of pixels in \[0, 16384\]"):
        Preprocessing((0.5,), (0.5,), **sizes)


@pytest.mark.parametrize("place", ["mean", "std"])
def test_a_saved_mean_that_is_no_number_in_floating_point_is_refused(place: str) -> None:
    with pytest.raises(CheckpointError, match="preprocessing is unusable"):
        DataOptions("digits").load({"mean": [0.5], "std": [0.5], place: [10**400]})
    with pytest.raises(DataError, match="finite"):
        Preprocessing(**{"mean": (0.5,), "std": (0.5,), place: (10**400,)})
