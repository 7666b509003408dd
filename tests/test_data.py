"""Images in: calibration streams, the data sets by name, and what is refused with which way out."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import pickle
import urllib.error
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import quickspike as qs
from quickspike.data import (
    BATCH,
    NPZ_KEYS,
    DataSet,
    Images,
    ImageStream,
    _every,
    image_batches,
    labelled_batches,
    load_data,
    mixed_order,
    share_of,
)
from quickspike.errors import DataError, QuickspikeError, UnknownNameError
from quickspike.preprocessing import PREPROCESSING, Preprocessing
from quickspike.wrapped import Wrapped

# The digits


def test_digits_have_the_documented_shape() -> None:
    data = load_data("digits")
    assert (data.name, data.class_names) == ("digits", tuple("0123456789"))
    assert (len(data.train), len(data.test)) == (1347, 450)
    image, label = data.train[0]
    assert (image.shape, image.dtype, type(label)) == (torch.Size([1, 8, 8]), torch.float32, int)
    for split in (data.train, data.test):
        assert sorted(set(split.labels.tolist())) == list(range(10))
        assert split.pixels.dtype == torch.uint8
        assert (int(split.pixels.min()), int(split.pixels.max())) == (0, 255)


def test_digits_are_the_same_every_time_and_the_splits_are_apart() -> None:
    random_state = (torch.get_rng_state(), np.random.get_state()[1].copy())
    one, two = load_data("digits"), load_data("digits")
    assert torch.equal(torch.get_rng_state(), random_state[0])
    assert np.array_equal(np.random.get_state()[1], random_state[1])
    for a, b in ((one.train, two.train), (one.test, two.test)):
        assert torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.labels, b.labels)
    train, test = ({bytes(row) for row in split.pixels.flatten(1).numpy()} for split in (one.train, one.test))
    assert len(train & test) <= 2


def test_digits_statistics_are_those_of_the_training_pixels() -> None:
    pixels = load_data("digits").train.pixels.double() / 255
    stated = PREPROCESSING["digits"]
    assert stated.mean == (pytest.approx(float(pixels.mean()), abs=5e-5),)
    assert stated.std == (pytest.approx(float(pixels.std(unbiased=False)), abs=5e-5),)


def test_digits_come_out_with_mean_0_and_deviation_1() -> None:
    images = torch.cat([images for images, _ in load_data("digits").loader("train")])
    assert float(images.mean()) == pytest.approx(0, abs=1e-3)
    assert float(images.std()) == pytest.approx(1, abs=1e-3)


def test_other_statistics_replace_the_own() -> None:
    data = load_data("digits", preprocessing=Preprocessing((0.25,), (0.5,)))
    assert data.preprocessing == Preprocessing((0.25,), (0.5,))
    assert torch.equal(data.train[3][0], (data.train.pixels[3] / 255 - 0.25) / 0.5)


def test_one_image_and_a_batch_are_normalised_alike() -> None:
    data = load_data("digits").test
    together = data.__getitems__([5, 0, 17])
    for (image, label), index in zip(together, (5, 0, 17), strict=True):
        assert torch.equal(image, data[index][0])
        assert label == data[index][1]


def test_the_published_statistics_have_one_value_per_channel() -> None:
    channels = {"mnist": 1, "fashion-mnist": 1, "digits": 1, "cifar10": 3, "cifar100": 3, "imagefolder": 3, "imagenet": 3, "npz": 1}
    assert channels == {name: len(preprocessing.mean) for name, preprocessing in PREPROCESSING.items()}
    assert channels == {name: len(preprocessing.std) for name, preprocessing in PREPROCESSING.items()}


def test_a_loader_keeps_the_order_and_the_limit() -> None:
    data = load_data("digits")
    sizes = [len(labels) for _, labels in data.loader("test")]
    assert sizes == [BATCH] * 4 + [50]
    first = torch.cat([labels for _, labels in data.loader("test", limit=7, batch_size=3)])
    assert first.tolist() == data.test.labels[:7].tolist()
    assert sum(len(labels) for _, labels in data.loader("test", limit=450)) == 450


@pytest.mark.parametrize("limit", [451, 0, -1])
def test_a_limit_that_the_set_does_not_hold_is_refused(limit: int) -> None:
    with pytest.raises(DataError, match=str(limit)):
        load_data("digits").loader("test", limit=limit)


def test_an_unknown_split_is_a_user_error() -> None:
    with pytest.raises(DataError, match="validation"):
        load_data("digits").loader("validation")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("digit", "'digits'"),
        ("fashion_mnist", "'fashion-mnist'"),
        ("cifar-10", "'cifar10'"),
        ("tinyimagenet", "known"),
        ("", "known"),
        ("zip:a", "n"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_data(name)
    assert repr(name) in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize("name", ["digits:more", "cifar10:/data", "mnist:"])
def test_a_path_behind_a_name_that_takes_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError):
        load_data(name, tmp_path)


# npz


def arrays(count: int = 6, shape: tuple[int, ...] = (5, 4)) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for split in ("train", "test"):
        made[f"{split}_images"] = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
        made[f"{split}_labels"] = np.arange(count) % 3
    return made


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3)])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.uint64])
def test_npz_is_read_as_it_is(shape: tuple[int, ...], dtype: Any, tmp_path: Path) -> None:
    made = arrays(shape=shape)
    made["train_labels"] = made["train_labels"].astype(dtype)
    np.savez_compressed(tmp_path / "a.npz", **made)
    data = load_data(f"npz:{tmp_path / 'a.npz'}")
    channels = shape[2] if len(shape) == 3 else 1
    images, labels = next(iter(data.loader("train")))
    assert images.shape == (6, channels, 5, 4)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert labels.dtype == torch.int64
    expected = torch.from_numpy(made["train_images"].reshape(6, 5, 4, channels)).permute(0, 3, 1, 2) / 255
    assert torch.equal(images, (expected - 0.5) / 0.5)
    assert data.class_names == ()
    assert data.preprocessing == Preprocessing((0.5,), (0.5,))


def test_npz_takes_names_statistics_and_further_arrays(tmp_path: Path) -> None:
    made = arrays(shape=(5, 4, 3)) | {"class_names": np.array(["a", "b", "ü"]), "note": np.zeros(2)}
    np.savez(tmp_path / "a:b.npz", **made)
    preprocessing = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    data = load_data(f"npz:{tmp_path / 'a:b.npz'}", preprocessing=preprocessing)
    assert data.class_names == ("a", "b", "ü")
    image = torch.from_numpy(made["test_images"][2]).permute(2, 0, 1) / 255
    assert torch.equal(
        data.test[2][0], (image - torch.tensor(preprocessing.mean).view(3, 1, 1)) / torch.tensor(preprocessing.std).view(3, 1, 1)
    )


Edit = Callable[[dict[str, Any]], None]


def entry(key: str, value: Any) -> Edit:
    return lambda made: made.update({key: value(made[key]) if callable(value) else value})


def without(key: str) -> Edit:
    return lambda made: made.__delitem__(key)


BAD_NPZ: dict[str, tuple[Edit, str]] = {
    **{f"without {key}": (without(key), key) for key in NPZ_KEYS},
    "float images": (entry("train_images", lambda a: a / 255), "uint8"),
    "int64 images": (entry("test_images", lambda a: a.astype(np.int64)), "uint8"),
    "images without a pixel axis": (entry("train_images", lambda a: a[:, 0]), "uint8"),
    "images of 2 channels": (entry("train_images", lambda a: np.stack([a, a], -1)), "C = 1 or 3"),
    "images channels first": (entry("train_images", lambda a: np.stack([a, a, a], 1)), "N, H, W"),
    "no images": (entry("train_images", lambda a: a[:0]), "labels|no images"),
    "nothing at all": (lambda made: made.update({key: value[:0] for key, value in made.items()}), "no images"),
    "images of no height": (entry("train_images", lambda a: a[:, :0]), "no images|0"),
    "float labels": (entry("train_labels", lambda a: a.astype(float)), "whole numbers"),
    "text labels": (entry("train_labels", lambda a: a.astype(str)), "whole numbers"),
    "one-hot labels": (entry("train_labels", lambda a: np.eye(3, dtype=int)[a]), "whole numbers"),
    "scalar label": (entry("train_labels", np.int64(1)), "whole numbers"),
    "fewer labels": (entry("test_labels", lambda a: a[:-1]), "6 whole numbers"),
    "more labels": (entry("test_labels", lambda a: np.append(a, 0)), "6 whole numbers"),
    "negative label": (entry("test_labels", lambda a: a - 1), ">= 0"),
    "label beyond int64": (entry("train_labels", lambda a: a.astype(np.uint64) + np.uint64(2**64 - 3)), "label"),
    "label without a class name": (lambda made: made.update(class_names=np.array(["a", "b"])), "label"),
    "test images of another size": (entry("test_images", lambda a: a[:, :-1]), "test"),
    "test images of other channels": (entry("test_images", lambda a: np.stack([a, a, a], -1)), "test"),
    "object arrays": (entry("train_labels", lambda a: a.astype(object)), "npz|pickle"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_a_bad_npz_is_refused_with_its_path_and_the_rule(case: str, tmp_path: Path) -> None:
    made, (edit, rule) = arrays(), BAD_NPZ[case]
    edit(made)
    path = tmp_path / "a.npz"
    np.savez(path, **made)
    with pytest.raises(DataError, match=rule) as caught:
        load_data(f"npz:{path}")
    assert str(path) in str(caught.value)


class Bomb:
    """Unpickling an instance creates the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_an_npz_that_holds_code_is_not_run(tmp_path: Path) -> None:
    bomb = np.empty(6, dtype=object)
    bomb[:] = [Bomb(tmp_path / "marker")] * 6
    np.savez(tmp_path / "a.npz", **(arrays() | {"class_names": bomb}))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    for name in "ab":
        with pytest.raises(DataError):
            load_data(f"npz:{tmp_path / name}.npz")
    assert not (tmp_path / "marker").exists()


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", **arrays())
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    contents = {"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2], "npy": (tmp_path / "array.npy").read_bytes()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            load_data(f"npz:{tmp_path / name}")
    with pytest.raises(DataError, match="no such file"):
        load_data(f"npz:{tmp_path / 'missing.npz'}")
    for name in (f"npz:{tmp_path}", "npz:", "npz"):
        with pytest.raises(QuickspikeError, match="npz"):
            load_data(name)


@pytest.mark.parametrize("shape", [(2**34,), (40_000, 40_000), (5,)])
def test_an_array_that_is_only_said_to_be_huge_costs_no_memory(shape: tuple[int, ...], tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    np.savez(tmp_path / "a.npz", **{key: value for key, value in arrays().items() if key != "train_images"})
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("train_images.npy", header.getvalue() + b"\0" * 100)
    with pytest.raises(DataError, match="train_images says that it is uint8"):
        load_data(f"npz:{tmp_path / 'a.npz'}")


def test_other_arrays_of_an_npz_are_not_even_read(tmp_path: Path) -> None:
    """They may be of any size and kind."""
    bomb = np.array([Bomb(tmp_path / "marker")], dtype=object)
    np.savez(tmp_path / "a.npz", **(arrays() | {"notes": bomb}))
    assert load_data(f"npz:{tmp_path / 'a.npz'}").size("train") == 6
    assert not (tmp_path / "marker").exists()


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **arrays(50))
    whole = path.read_bytes()
    for position in range(60, len(whole) // 2, 97):
        changed = bytearray(whole)
        changed[position] ^= 0x55
        path.write_bytes(changed)
        # A flip in a field that zip keeps twice may go unnoticed; what must not happen is another error.
        with contextlib.suppress(DataError):
            load_data(f"npz:{path}")


@pytest.mark.parametrize(
    "preprocessing",
    [Preprocessing((0.5, 0.5), (0.5, 0.5)), Preprocessing((0.5,), (0.5, 0.5, 0.5)), Preprocessing((), ()), Preprocessing((0.5,), ())],
)
def test_statistics_of_another_channel_count_are_refused(preprocessing: Preprocessing) -> None:
    with pytest.raises(DataError, match="channel"):
        load_data("digits", preprocessing=preprocessing)


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.0), (0.5, -1.0), (float("nan"), 1.0), (0.5, float("nan")), (0.5, float("inf"))])
def test_statistics_that_cannot_normalise_are_refused(mean: float, std: float) -> None:
    with pytest.raises(DataError, match="std"):
        load_data("digits", preprocessing=Preprocessing((mean,), (std,)))


# torchvision's sets, from files made here


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def make_mnist(folder: Path, name: str) -> dict[str, np.ndarray]:
    raw, generator, made = folder / name / "raw", np.random.default_rng(0), {}
    raw.mkdir(parents=True)
    for split, count in (("train", 12), ("t10k", 7)):
        made[split] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(raw / f"{split}-images-idx3-ubyte", made[split])
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.arange(count) % 10)
    return made


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_files_are_read(name: str, folder: str, tmp_path: Path) -> None:
    made = make_mnist(tmp_path, folder)
    data = load_data(name, tmp_path)
    assert (len(data.train), len(data.test), len(data.class_names)) == (12, 7, 10)
    assert np.array_equal(data.train.pixels.numpy()[:, 0], made["train"])
    assert np.array_equal(data.test.pixels.numpy()[:, 0], made["t10k"])
    assert data.test.labels.tolist() == list(range(7))
    mean, std = PREPROCESSING[name].mean[0], PREPROCESSING[name].std[0]
    assert torch.allclose(data.train[1][0][0], (torch.from_numpy(made["train"][1]) / 255 - mean) / std)


CIFAR = {
    "cifar10": (
        "CIFAR10",
        "cifar-10-batches-py",
        [f"data_batch_{n}" for n in range(1, 6)],
        "test_batch",
        "batches.meta",
        "labels",
        "label_names",
    ),
    "cifar100": ("CIFAR100", "cifar-100-python", ["train"], "test", "meta", "fine_labels", "fine_label_names"),
}


def make_cifar(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The official layout with 2 images in each batch; returns the training images `[N, 3, 32, 32]`."""
    from torchvision import datasets

    cls, base, train, test, meta, label_key, names_key = CIFAR[name]
    # The real check compares with the md5 sums of the real files.
    monkeypatch.setattr(getattr(datasets, cls), "_check_integrity", lambda self: True)
    monkeypatch.setitem(getattr(datasets, cls).meta, "md5", None)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())
    (folder / base).mkdir(parents=True)
    generator, made = np.random.default_rng(0), []
    for file in [*train, test]:
        pixels = generator.integers(0, 256, (2, 3072), dtype=np.uint8)
        made.append(pixels)
        (folder / base / file).write_bytes(pickle.dumps({"data": pixels, label_key: [1, 9]}))
    names = [f"class {n}" for n in range(10 if name == "cifar10" else 100)]
    (folder / base / meta).write_bytes(pickle.dumps({names_key: names}))
    return np.concatenate(made[:-1]).reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_files_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_cifar(tmp_path, name, monkeypatch)
    data = load_data(name, str(tmp_path))
    assert (len(data.train), len(data.test)) == (len(made), 2)
    assert np.array_equal(data.train.pixels.numpy(), made)
    assert data.train.labels.tolist() == [1, 9] * (len(made) // 2)
    assert data.class_names[9] == "class 9"
    assert data.train[0][0].shape == (3, 32, 32)


SETS = ["mnist", "fashion-mnist", "cifar10", "cifar100"]


@pytest.mark.parametrize("name", SETS)
def test_missing_files_name_the_way_out(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data-dir"):
        load_data(name)
    with pytest.raises(DataError, match=r"--download.*npz:") as caught:
        load_data(name, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"garbage" * 40, b"\0\0\x08\x03" + b"\xff" * 12])
def test_damaged_mnist_files_are_a_user_error(content: bytes, tmp_path: Path) -> None:
    make_mnist(tmp_path, "MNIST")
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match="mnist"):
        load_data("mnist", tmp_path)


def test_damaged_cifar_files_are_a_user_error(tmp_path: Path) -> None:
    # Without the patched md5 check, made files are what torchvision calls corrupted.
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    for file in (*CIFAR["cifar10"][2], "test_batch", "batches.meta"):
        (base / file).write_bytes(b"garbage")
    with pytest.raises(DataError, match="cifar10"):
        load_data("cifar10", tmp_path)


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no network"), ConnectionResetError("reset"), RuntimeError("File not found or corrupted.")]
)
@pytest.mark.parametrize(("name", "cls"), [("mnist", "MNIST"), ("cifar10", "CIFAR10")])
def test_a_download_that_fails_is_a_user_error(
    name: str, cls: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    def fail(self: Any) -> None:
        raise error

    monkeypatch.setattr(getattr(datasets, cls), "download", fail)
    with pytest.raises(DataError, match=name):
        load_data(name, tmp_path, download=True)


def test_a_download_into_an_unwritable_place_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="mnist"):
        load_data("mnist", tmp_path / "file" / "below", download=True)


def test_nothing_is_fetched_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    for cls in (datasets.MNIST, datasets.FashionMNIST, datasets.CIFAR10, datasets.CIFAR100):
        monkeypatch.setattr(cls, "download", lambda self: pytest.fail("a download was tried"))
    for name in SETS:
        with pytest.raises(DataError):
            load_data(name, tmp_path)


def test_compressed_mnist_files_alone_are_not_enough(tmp_path: Path) -> None:
    made = make_mnist(tmp_path, "MNIST")
    raw = tmp_path / "MNIST/raw"
    for file in list(raw.iterdir()):
        (raw / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert made
    with pytest.raises(DataError, match="--download"):
        load_data("mnist", tmp_path)


# Image folders


def make_folder(path: Path, splits: tuple[str, ...] = ("train", "test"), classes: tuple[str, ...] = ("cat", "dog")) -> None:
    from PIL import Image

    generator = np.random.default_rng(0)
    for split in splits:
        for number, name in enumerate(classes):
            (path / split / name).mkdir(parents=True)
            for index in range(2):
                pixels = generator.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / split / name / f"{index}.png")


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "val")])
def test_image_folders_are_read(splits: tuple[str, ...], tmp_path: Path) -> None:
    make_folder(tmp_path, splits)
    data = load_data(f"imagefolder:{tmp_path}")
    assert (len(data.train), len(data.test), data.class_names) == (4, 4, ("cat", "dog"))
    images, labels = next(iter(data.loader("test")))
    assert images.shape == (4, 3, 224, 224)
    assert images.dtype == torch.float32
    assert sorted(labels.tolist()) == [0, 0, 1, 1]
    low = [(0 - mean) / std for mean, std in zip(PREPROCESSING["imagefolder"].mean, PREPROCESSING["imagefolder"].std, strict=True)]
    assert float(images.min()) >= min(low) - 1e-5


def test_any_part_of_an_image_folder_holds_all_classes(tmp_path: Path) -> None:
    """Folders come sorted by class: the first images, which calibrate, would all be of one class, and so would the last."""
    from PIL import Image

    for split in ("train", "val"):
        for number in range(10):
            (tmp_path / split / f"{number}").mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (8, 8), (number, index, 0)).save(tmp_path / split / f"{number}" / f"{index}.png")
    plain = Preprocessing((0.0,), (1.0,))
    data, again = (load_data(f"imagefolder:{tmp_path}", preprocessing=plain) for _ in range(2))

    def labels_of(data: DataSet, split: str, limit: int, last: bool = False) -> list[int]:
        loader = data.loader(split, limit=limit, last=last)
        for images, labels in loader:
            assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
        return [int(label) for _, labels in loader for label in labels]

    for split in ("train", "test"):
        for last in (False, True):
            found = labels_of(data, split, 10, last)
            assert len(set(found)) == 10
            assert found != sorted(found)
            assert found == labels_of(again, split, 10, last)
    assert sorted(labels_of(data, "train", 40)) == sorted([*range(10)] * 4)
    held_out = {tuple(image.flatten().tolist()) for image, _ in (data.train[index] for index in range(30, 40))}
    left = data.without_last(10)
    assert not held_out & {tuple(left.train[index][0].flatten().tolist()) for index in range(30)}


def test_a_mixed_order_keeps_proportions_everywhere() -> None:
    labels = [0] * 600 + [1] * 300 + [2] * 97 + [3] * 3
    order = mixed_order(labels)
    assert sorted(order) == list(range(1000))
    assert order == mixed_order(labels)
    assert mixed_order([5]) == [0]
    for start in range(0, 1000, 100):
        part = [labels[place] for place in order[start : start + 100]]
        assert all(abs(part.count(label) - labels.count(label) / 10) <= 1 for label in range(4))
    # Places within a class are not in their stored order either: files are often named by when they were taken.
    zeros = [place for place in order if place < 600]
    assert np.corrcoef(zeros, range(600))[0, 1] < 0.1


def test_bad_image_folders_are_refused(tmp_path: Path) -> None:
    for name in (tmp_path / "missing", tmp_path):
        with pytest.raises(DataError, match="train"):
            load_data(f"imagefolder:{name}")
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="train"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "train" / "cat").mkdir()
    (tmp_path / "train" / "cat" / "note.txt").write_text("")
    with pytest.raises(DataError, match="cat"):
        load_data(f"imagefolder:{tmp_path}")


def test_an_image_folder_whose_splits_hold_other_classes_is_refused(tmp_path: Path) -> None:
    """Labels follow from the sorted folder names of each split: a missing class would shift them silently."""
    make_folder(tmp_path, ("train",), ("ant", "bee", "cat"))
    make_folder(tmp_path, ("test",), ("bee", "cat"))
    with pytest.raises(DataError, match="ant"):
        load_data(f"imagefolder:{tmp_path}")


def test_a_picture_that_cannot_be_read_is_a_user_error(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no picture")
    data = load_data(f"imagefolder:{tmp_path}")
    with pytest.raises(DataError, match=r"0\.png"):
        list(ImageStream(data.loader("train")))


def test_image_folder_statistics_have_to_fit(tmp_path: Path) -> None:
    make_folder(tmp_path)
    with pytest.raises(DataError, match="channel"):
        load_data(f"imagefolder:{tmp_path}", preprocessing=Preprocessing((0.5, 0.5), (0.5, 0.5)))


# Images, the class


def test_images_do_not_share_the_callers_memory_in_a_way_that_changes_it() -> None:
    pixels, labels = np.zeros((3, 4, 4), np.uint8), np.array([0, 1, 2], np.int32)
    images = Images(pixels, labels, Preprocessing((0.5,), (0.5,)), "here")
    images[0][0].add_(1)
    images.__getitems__([0, 1])[0][0].add_(1)
    assert pixels.max() == 0
    assert torch.equal(images[0][0], torch.full((1, 4, 4), -1.0))


# Streams


def batch(count: int = 4, fill: float | None = None) -> Tensor:
    images = torch.randn(count, 1, 3, 3, generator=torch.Generator().manual_seed(count))
    return images if fill is None else images.fill_(fill)


class Same(Dataset[Any]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return batch(7)[index], index


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(batch(7))


def rows(stream: ImageStream) -> Tensor:
    return torch.cat(list(stream))


MANY = {
    "tensor": lambda: batch(7),
    "list of tensors": lambda: [batch(7)[:4], batch(7)[4:]],
    "tuple of tensors": lambda: (batch(7)[:4], batch(7)[4:]),
    "pairs": lambda: [(batch(7)[:4], torch.arange(4)), [batch(7)[4:], torch.arange(3)]],
    "pairs with lists": lambda: [(batch(7), list(range(7)))],
    "singles": lambda: [(batch(7),)],
    "dicts": lambda: [{"pixel_values": batch(7)[:4], "labels": [0] * 4}, {"pixel_values": batch(7)[4:]}],
    "loader": lambda: DataLoader(Same(), batch_size=3),
    "loader of tensors": lambda: DataLoader(TensorDataset(batch(7)), batch_size=3),
    "loader over an iterable": lambda: DataLoader(Endless(), batch_size=3),
}


@pytest.mark.parametrize("source", MANY)
def test_a_stream_can_be_passed_over_again(source: str) -> None:
    stream = ImageStream(MANY[source]())
    for _ in range(3):
        assert torch.equal(rows(stream), batch(7))
        assert stream.samples == 7
    assert stream.example.shape == (1, 1, 3, 3)


@pytest.mark.parametrize("key", ["image", "images", "pixel_values", "input", "inputs", "x", "data"])
def test_a_dict_is_known_by_its_usual_keys(key: str) -> None:
    assert torch.equal(next(image_batches([{key: batch(), "other": 1}])), batch())


def test_a_generator_can_be_passed_over_once() -> None:
    for source in ((part for part in batch(7).split(3)), iter([batch(3), batch(4)]), map(torch.clone, batch(7).split(3))):
        stream = ImageStream(source)
        assert len(rows(stream)) == 7
        assert stream.samples == 7
        with pytest.raises(DataError, match="generator"):
            list(stream)
    assert torch.equal(rows(ImageStream(part for part in batch(7).split(3))), batch(7))


def test_a_source_that_gives_its_batches_once_is_not_read_short() -> None:
    """Its first batch is taken for the example; a later pass must not silently go without it."""

    class Once:
        def __init__(self) -> None:
            self.left = iter(batch(7).split(3))

        def __iter__(self) -> Iterator[Tensor]:
            return self.left

    stream = ImageStream(Once())
    try:
        seen = rows(stream)
    except DataError:
        return
    assert len(seen) == 7


def test_a_large_tensor_is_cut() -> None:
    assert [len(part) for part in ImageStream(torch.zeros(2 * BATCH + 1, 1, 2, 2))] == [BATCH, BATCH, 1]


BAD_BATCHES: dict[str, tuple[Any, str]] = {
    "NaN": (batch(fill=float("nan")), "NaN"),
    "one NaN": (batch().index_fill(0, torch.tensor([2]), float("nan")), "NaN"),
    "infinite": (batch(fill=float("-inf")), "infinite"),
    "uint8": (batch().to(torch.uint8), "uint8"),
    "int64": (batch().long(), "int64"),
    "bool": (batch() > 0, "bool"),
    "complex": (batch().to(torch.complex64), "complex"),
    "empty": (batch()[:0], "at least one"),
    "one axis": (torch.zeros(3), "shape"),
    "no axis": (torch.tensor(1.0), "shape"),
    "no axis at all left": (torch.zeros(2, 0), "at least one"),
    "array": (batch().numpy(), "ndarray"),
    "text": ("abc", "str"),
    "None": (None, "NoneType"),
    "dict without images": ({"picture": batch()}, "picture"),
    "dict of text": ({"image": "abc"}, "str"),
    "empty tuple": ((), "tuple"),
    "pair of text": (("a", "b"), "tuple"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_first_batch_is_refused_at_once(case: str) -> None:
    bad, rule = BAD_BATCHES[case]
    with pytest.raises(DataError, match=rule) as caught:
        ImageStream([bad, batch()])
    assert "batch" in str(caught.value)


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_later_batch_is_refused_with_its_number(case: str) -> None:
    bad, rule = BAD_BATCHES[case]
    stream = ImageStream([batch(), batch(), bad])
    with pytest.raises(DataError, match=rule) as caught:
        list(stream)
    assert "3" in str(caught.value)


@pytest.mark.parametrize("other", [torch.zeros(4, 1, 3, 4), torch.zeros(4, 2, 3, 3), torch.zeros(4, 9)])
def test_batches_of_another_shape_are_refused_with_their_number(other: Tensor) -> None:
    with pytest.raises(DataError, match=r"batch 2 .*\[1, 3, 3\]"):
        list(ImageStream([batch(), other]))


@pytest.mark.parametrize("source", [[], (), iter([]), {}, DataLoader(TensorDataset(batch()[:0])), (part for part in ())])
def test_an_empty_source_is_refused(source: Any) -> None:
    with pytest.raises(DataError, match="empty"):
        ImageStream(source)


@pytest.mark.parametrize("source", [torch.zeros(0, 1, 3, 3), torch.tensor(1.0), torch.zeros(3), torch.zeros(2, 1, 3, 3).byte()])
def test_a_bad_tensor_is_refused(source: Tensor) -> None:
    with pytest.raises(DataError):
        ImageStream(source)


@pytest.mark.parametrize("source", [3, None, nn.Linear(2, 2)])
def test_what_is_no_source_is_refused(source: Any) -> None:
    with pytest.raises(DataError, match="DataLoader"):
        ImageStream(source)


def test_calibration_ignores_labels_of_any_kind() -> None:
    for labels in (["cat", "dog", "cat", "dog"], None, {"boxes": 1}, object()):
        assert torch.equal(rows(ImageStream([(batch(), labels)])), batch())
        assert torch.equal(rows(ImageStream([{"image": batch(), "label": labels}])), batch())


def test_labels_that_are_no_numbers_are_refused_where_they_are_needed() -> None:
    for labels in (["cat"] * 4, [None] * 4, object()):
        with pytest.raises(DataError, match="label"):
            list(labelled_batches([(batch(), labels)]))


def test_labels_are_handed_out_with_their_images() -> None:
    for source in (
        [(batch(), [3, 2, 1, 0])],
        [{"x": batch(), "y": torch.tensor([3, 2, 1, 0])}],
        [{"data": batch(), "targets": [3, 2, 1, 0]}],
    ):
        ((images, labels),) = labelled_batches(source)
        assert torch.equal(images, batch())
        assert labels is not None
        assert labels.tolist() == [3, 2, 1, 0]
    assert next(iter(labelled_batches(batch())))[1] is None


def test_a_stream_does_not_change_its_source() -> None:
    source = [batch(), batch()]
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten())
    qs.convert(model, source, steps=2)
    assert all(torch.equal(part, batch()) for part in source)


def test_feeding_leaves_the_module_in_evaluation_mode_even_if_it_fails() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.probe = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            assert self.probe.training
            assert not torch.is_grad_enabled()
            raise RuntimeError("boom")

    module = Fails()
    with pytest.raises(RuntimeError, match="boom"):
        ImageStream(batch()).feed(module, [module.probe])
    assert not module.training
    assert not module.probe.training


def test_feeding_fits_the_precision_of_the_module() -> None:
    module = nn.Conv2d(1, 2, 3).double()
    seen: list[torch.dtype] = []
    module.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    ImageStream(batch()).feed(module)
    assert seen == [torch.float64]


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_last_images_can_be_held_out_of_the_training_split(in_memory: bool, digits: DataSet) -> None:
    size = digits.size("train")
    whole = digits if in_memory else dataclasses.replace(digits, train=torch.utils.data.Subset(digits.train, range(size)))
    part = whole.without_last(100)
    assert (part.size("train"), part.size("test")) == (size - 100, digits.size("test"))
    for at in (0, size - 101):
        assert torch.equal(part.train[at][0], digits.train[at][0])
        assert part.train[at][1] == digits.train[at][1]
    assert len(next(iter(part.loader("train", batch_size=size)))[1]) == size - 100
    assert (whole.size("train"), whole.without_last(0).size("train")) == (size, size)
    for images in (size, size + 1, -1):
        with pytest.raises(DataError, match=f"{images} of {size} training images held out leave none to train on"):
            whole.without_last(images)


class Noting(Dataset[tuple[Tensor, int]]):
    """Ten images; notes which were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        return torch.full((1, 2, 2), float(index)), index


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_process_reads_its_own_batches_alone(processes: int, wrapped: bool) -> None:
    seen: list[tuple[int, list[int]]] = []
    for rank in range(processes):
        images = Noting()
        source: Any = DataLoader(images, batch_size=3)
        own = []
        for number, _, labels in share_of(Wrapped(source) if wrapped else source, rank, processes):
            assert labels is not None
            own.append((number, labels.tolist()))
        assert images.read == [label for _, labels in own for label in labels]
        seen += own
    assert sorted(seen) == [(1, [0, 1, 2]), (2, [3, 4, 5]), (3, [6, 7, 8]), (4, [9])]


@pytest.mark.parametrize("kind", ["tensor", "generator", "shuffled"])
def test_other_sources_are_shared_out_batch_by_batch(kind: str) -> None:
    """A loader that shuffles would deal every process another order; the processes' generators are seeded alike."""
    seen = []
    for rank in range(2):
        torch.manual_seed(0)
        source: Any = {
            "tensor": torch.arange(2.0 * BATCH + 1).view(-1, 1),
            "generator": (torch.full((2, 1), float(i)) for i in range(5)),
            "shuffled": DataLoader(TensorDataset(torch.arange(9.0).view(-1, 1)), batch_size=2, shuffle=True),
        }[kind]
        seen += [(number, images) for number, images, _ in share_of(source, rank, 2)]
    numbers = sorted(number for number, _ in seen)
    assert numbers == list(range(1, len(numbers) + 1))
    values = torch.cat([images for _, images in seen]).flatten().sort().values.tolist()
    assert (
        values
        == {
            "tensor": [float(i) for i in range(2 * BATCH + 1)],
            "generator": [float(i // 2) for i in range(10)],
            "shuffled": [float(i) for i in range(9)],
        }[kind]
    )


def test_errors_name_the_batch_of_all_and_workers_start_as_they_are_to() -> None:
    source: Any = DataLoader(Noting(), batch_size=3, num_workers=1, multiprocessing_context="spawn", prefetch_factor=3)
    part = _every(source, 1, 2)
    assert (part.multiprocessing_context.get_start_method(), part.prefetch_factor, part.num_workers) == ("spawn", 3, 1)
    broken: Any = DataLoader(Noting(), batch_size=3, collate_fn=lambda items: {"foo": 1})
    for rank in (0, 1):
        with pytest.raises(DataError, match=f"batch {rank + 1} is a dict"):
            list(share_of(broken, rank, 2))
