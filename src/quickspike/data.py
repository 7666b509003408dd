"""Images in: calibration streams, the data sets by name, and how pixels become the network's input."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, Subset

from quickspike.capture import check_batch
from quickspike.errors import DataError, UnknownNameError
from quickspike.memory import out_of_memory
from quickspike.plausibility import warn_of_pixels
from quickspike.preprocessing import PREPROCESSING, Preprocessing
from quickspike.wrapped import Wrapped

logger = logging.getLogger(__name__)

IMAGE_KEYS = ("image", "images", "pixel_values", "input", "inputs", "x", "data")
LABEL_KEYS = ("label", "labels", "target", "targets", "y")
HEAD = 2**26
"""Values of the first images that a stream keeps, for methods that simulate a single batch."""
BATCH = 100
"""Samples a tensor is cut into when it comes without batches."""

Batches = Tensor | Iterable[Any]
"""A tensor `[N, ...]`, or an iterable of tensors, (tensor, label) pairs or dicts."""


def image_batches(source: Batches) -> Iterator[Tensor]:
    """The image tensors `[B, ...]` of any accepted source.

    Raises:
        DataError: an element holds no image tensor.
    """
    for _, images, _ in _raw_batches(source):
        yield images


def labelled_batches(source: Batches) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(images, labels or None) of any accepted source.

    Raises:
        DataError: an element is neither a tensor, a (tensor, labels) pair nor a dict with a known key.
    """
    for _, images, labels in _numbered(source):
        yield images, labels


def _numbered(source: Batches, first: int = 1, step: int = 1) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    for number, images, labels in _raw_batches(source, first, step):
        try:
            yield number, images, None if labels is None else torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"batch {number}: its labels are no whole numbers ({error})") from error


def share_of(source: Batches, rank: int, processes: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(number from 1 on, images, labels or None) of every batch that one of several processes takes: in turn, the first takes the first.

    A DataLoader reads nothing of the others where that changes nothing: where its samples come in their order.

    Raises:
        DataError: see `labelled_batches`.
    """
    if processes > 1 and _in_order(source):
        yield from _numbered(_every(source, rank, processes), rank + 1, processes)
        return
    for number, images, labels in _numbered(source):
        if (number - 1) % processes == rank:
            yield number, images, labels


_OF_WORKERS = ("prefetch_factor", "multiprocessing_context", "timeout")
_HOW = ("num_workers", "collate_fn", "pin_memory", "worker_init_fn", "generator", *_OF_WORKERS)
"""How a DataLoader reads, whatever it reads; the first are for worker processes only."""


def _in_order(source: Any) -> bool:
    while isinstance(source, Wrapped):
        source = source.source
    return type(source) is DataLoader and type(source.batch_sampler) is BatchSampler and type(source.sampler) is SequentialSampler


def _every(source: Any, start: int, step: int) -> Any:
    """Every `step`-th batch of a source that is `_in_order`, without reading the others."""
    if isinstance(source, Wrapped):
        part = copy.copy(source)
        part.source = _every(source.source, start, step)
        return part
    batches = list(itertools.islice(source.batch_sampler, start, None, step))
    how = {name: getattr(source, name) for name in _HOW if source.num_workers or name not in _OF_WORKERS}
    return DataLoader(source.dataset, batch_sampler=batches, **how)


def _raw_batches(source: Batches, first: int = 1, step: int = 1) -> Iterator[tuple[int, Any, Any]]:
    if isinstance(source, Tensor):
        check_batch(source, "the image batch")
        source = torch.split(source, BATCH)
    try:
        iterator = iter(source)
    except TypeError:
        kind = type(source).__name__
        raise DataError(f"expected a tensor or an iterable of batches, got {kind}; wrap a Dataset in a DataLoader") from None
    for number, batch in zip(itertools.count(first, step), iterator):
        yield number, *_split(batch, number)


def _split(batch: Any, number: int) -> tuple[Any, Any]:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        image_key = next((key for key in IMAGE_KEYS if key in batch), None)
        if image_key is None:
            raise DataError(f"batch {number} is a dict with keys {sorted(map(str, batch))}; expected one of {', '.join(IMAGE_KEYS)}")
        label_key = next((key for key in LABEL_KEYS if key in batch), None)
        return batch[image_key], None if label_key is None else batch[label_key]
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return batch[0], batch[1] if len(batch) > 1 else None
    raise DataError(f"batch {number} is a {type(batch).__name__}; expected a tensor, a (tensor, labels) pair or a dict")


def _is_one_shot(source: Batches) -> bool:
    """True for an iterator, and for an object that hands out the same one at every call."""
    return isinstance(source, Iterator) or (not isinstance(source, (Tensor, DataLoader, list, tuple)) and iter(source) is iter(source))


class ImageStream:
    """Checked calibration images that can be passed over as often as their source can.

    Args:
        source: see `Batches`; a one-shot iterator can be passed over once.

    Raises:
        DataError: the source is empty or its first batch is unusable.
    """

    def __init__(self, source: Batches) -> None:
        self._source = source
        self._one_shot: Iterator[Tensor] | None = None
        self.samples = 0
        """Images handed out in the last complete pass."""
        self._head: list[Tensor] = []
        iterator = image_batches(source)
        first = next(iterator, None)
        if first is None:
            raise DataError("the calibration data is empty; give at least one batch of images")
        self.first = first
        check_batch(self.first, "calibration batch 1")
        warn_of_pixels(self.first, "the calibration images")
        if _is_one_shot(source):
            self._one_shot = itertools.chain([self.first], iterator)

    @property
    def example(self) -> Tensor:
        """One sample, `[1, ...]`."""
        return self.first[:1]

    def __iter__(self) -> Iterator[Tensor]:
        batches = image_batches(self._source)
        if _is_one_shot(self._source):
            if self._one_shot is None:
                raise DataError("the calibration data is a generator and was used up; give a list or a DataLoader")
            batches, self._one_shot = self._one_shot, None
        samples, self._head = 0, []
        for number, images in enumerate(batches, 1):
            check_batch(images, f"calibration batch {number}")
            if images.shape[1:] != self.first.shape[1:]:
                shapes = f"{list(images.shape[1:])}, the first {list(self.first.shape[1:])}"
                raise DataError(f"calibration batch {number} holds samples of shape {shapes}; all must be alike")
            samples += len(images)
            if sum(map(Tensor.numel, self._head)) < HEAD:
                self._head.append(images)
            yield images
        self.samples = samples

    def some(self, samples: int) -> Iterator[Tensor]:
        """Batches with the first images, up to so many; of a generator that was used up those that are remembered.

        Raises:
            DataError: a batch is unusable.
        """
        if not _is_one_shot(self._source):
            batches: Iterable[Tensor] = image_batches(self._source)
        else:
            batches = self._head if self._one_shot is None else self
        for images in batches:
            check_batch(images, "a calibration batch")
            yield images[:samples]
            samples -= len(images)
            if samples <= 0:
                return

    def head(self, samples: int) -> Tensor:
        """The first images as one batch, `[B, ...]` with B at most `samples`, without another pass if there was one.

        Raises:
            DataError: there was no pass, and the source is a generator that was used up.
        """
        if not self._head:
            for _ in self:
                if sum(map(len, self._head)) >= samples:
                    break
        return torch.cat(self._head)[:samples]

    def feed(self, module: nn.Module, watching: Iterable[nn.Module] = ()) -> None:
        """Run every batch through `module` in evaluation mode without gradients.

        Args:
            module: the network.
            watching: parts of it that are in training mode meanwhile, such as probes that collect statistics.
        """
        parameter = next(module.parameters(), torch.empty(0))
        module.eval()
        watchers = list(watching)
        try:
            for part in watchers:
                part.train()
            with torch.no_grad():
                for images in self:
                    module(images.to(parameter))
        finally:
            for part in watchers:
                part.eval()


# Data sets by name


NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "imagenet", "imagefolder:PATH", "npz:PATH")
CLASSES = 1000
"""Of ImageNet."""
NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")


class Images(Dataset[tuple[Tensor, int]]):
    """uint8 pictures held in memory, given out as normalised tensors `[C, H, W]` with their label.

    Args:
        pixels: `[N, H, W]` or `[N, H, W, C]`, uint8.
        labels: `[N]`, whole numbers.
        preprocessing: see `Preprocessing`.

    Raises:
        DataError: shapes, dtypes or label values do not fit.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, preprocessing: Preprocessing, where: str) -> None:
        if pixels.ndim == 3:
            pixels = pixels[..., None]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
            shape = f"{pixels.dtype} {list(pixels.shape)}{_pixel_hint(pixels)}"
            raise DataError(f"{where}: images must be uint8 [N, H, W] or [N, H, W, C] with C = 1 or 3, got {shape}")
        if labels.ndim != 1 or len(labels) != len(pixels) or labels.dtype.kind not in "iu":
            raise DataError(f"{where}: labels must be {len(pixels)} whole numbers, got {labels.dtype} {list(labels.shape)}")
        if pixels.size == 0:
            raise DataError(f"{where}: holds no images")
        if labels.min() < 0 or labels.max() >= 2**31:
            raise DataError(f"{where}: labels must be >= 0 and below 2^31, found {labels.min()}..{labels.max()}")
        channels = pixels.shape[3]
        if len(preprocessing.mean) not in (1, channels) or len(preprocessing.std) not in (1, channels):
            raise DataError(f"{where}: images have {channels} channel(s), but {len(preprocessing.mean)} mean(s) were given")
        self.pixels = preprocessing.pixels(torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))))
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
        self.std = torch.tensor(preprocessing.std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, images: int) -> Images:
        """The first so many, without a copy."""
        part = copy.copy(self)
        part.pixels, part.labels = self.pixels[:images], self.labels[:images]
        return part

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return (self.pixels[index] / 255 - self.mean) / self.std, int(self.labels[index])

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """A whole batch in one go; DataLoader prefers this over one call per image."""
        images = (self.pixels[indices] / 255 - self.mean) / self.std
        return list(zip(images, self.labels[indices].tolist(), strict=True))


def _pixel_hint(pixels: np.ndarray) -> str:
    """The way out of a usual mistake; "" for others."""
    if pixels.ndim == 4 and pixels.shape[1] in (1, 3) and pixels.shape[3] not in (1, 3):
        return "; channels come last, give images.transpose(0, 2, 3, 1)"
    if pixels.dtype.kind == "f":
        return "; give the pixels themselves, 0 to 255, and say with mean and std how they are normalised"
    return ""


@dataclass(frozen=True)
class DataSet:
    """Training and test images of one named set."""

    name: str
    train: Dataset[tuple[Tensor, int]]
    test: Dataset[tuple[Tensor, int]]
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()
    workers: int = 0
    """Processes that read pictures from files; 0 for none but this one."""

    def size(self, split: str) -> int:
        """Number of images in a split ("train" or "test")."""
        return len({"train": self.train, "test": self.test}[split])  # type: ignore[arg-type]  # all of ours have a length

    def loader(self, split: str, batch_size: int = BATCH, limit: int | None = None, last: bool = False) -> DataLoader[Any]:
        """Batches of a split ("train" or "test") in its order, the first (or last) `limit` images if given.

        The order is the stored one; that of folders, which are sorted by class, mixes the classes (see `mixed_order`).

        Raises:
            DataError: no such split, or it does not hold so many images.
        """
        if split not in ("train", "test"):
            raise DataError(f"a split is train or test, got {split!r}")
        images = self.train if split == "train" else self.test
        if limit is not None:
            size = self.size(split)
            if not 1 <= limit <= size:
                raise DataError(f"{self.name}: asked for {limit} {split} images, it holds {size}")
            part = slice(size - limit, size) if last else slice(limit)
            _warn_of_one_class(images, part, f"{self.name}: the {'last' if last else 'first'} {limit} {split} images")
            images = Subset(images, range(size)[part])
        return DataLoader(images, batch_size=batch_size, num_workers=self.workers)

    def without_last(self, images: int) -> DataSet:
        """The same set whose training split lacks its last `images` images, so that these can be measured on.

        Raises:
            DataError: none would be left to train on.
        """
        left = self.size("train") - images
        if not 0 <= images < left + images:
            raise DataError(f"{self.name}: {images} of {left + images} training images held out leave none to train on")
        train = self.train.first(left) if isinstance(self.train, Images) else Subset(self.train, range(left))
        return replace(self, train=train)


def _warn_of_one_class(images: Dataset[Any], part: slice, what: str) -> None:
    """Ceilings and margins would be those of one class; sets that were sorted by class begin with it."""
    if isinstance(images, Images) and (label := only_class(images.labels[part])) is not None:
        logger.warning("%s are all of class %d; if the set is sorted by class, shuffle it once before it is saved", what, label)


def only_class(labels: Tensor) -> int | None:
    """The one class that several labels name; None for several classes, or a single label."""
    if labels.numel() < 2:
        return None
    low, high = torch.stack(labels.aminmax()).tolist()
    return int(low) if low == high else None


def load_data(
    name: str, data_dir: str | Path | None = None, preprocessing: Preprocessing | None = None, download: bool = False, workers: int = 0
) -> DataSet:
    """A data set by its name on the command line.

    Args:
        name: one of `NAMES`.
        data_dir: where torchvision keeps its files (mnist, fashion-mnist, cifar10, cifar100), or the folder with the folders
            train and val of ImageNet, each with one folder per class.
        preprocessing: what the network was trained with; by default the set's own, for `npz` 0.5 and 0.5.
        download: let torchvision fetch missing files.
        workers: processes that read pictures (imagenet, imagefolder).

    Raises:
        UnknownNameError: no such data set.
        DataError: files are missing or unusable.
    """
    kind, colon, path = name.partition(":")
    if bool(colon) != (kind in ("npz", "imagefolder")):
        raise UnknownNameError("data set", name, NAMES)
    if kind == "digits":
        return _digits(preprocessing or PREPROCESSING[kind])
    if kind == "npz":
        return _npz(Path(path), preprocessing or PREPROCESSING[kind])
    if kind == "imagefolder":
        return replace(_image_folder(Path(path), preprocessing or PREPROCESSING[kind]), workers=workers)
    if kind == "imagenet":
        return replace(_imagenet(data_dir, preprocessing or PREPROCESSING[kind]), workers=workers)
    if kind in PREPROCESSING:
        return _torchvision(kind, data_dir, preprocessing or PREPROCESSING[kind], download)
    raise UnknownNameError("data set", name, NAMES)


def _digits(preprocessing: Preprocessing) -> DataSet:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    split = train_test_split(pixels, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
    train_pixels, test_pixels, train_labels, test_labels = split
    train = Images(train_pixels, train_labels, preprocessing, "digits")
    return DataSet("digits", train, Images(test_pixels, test_labels, preprocessing, "digits"), preprocessing, tuple("0123456789"))


def _npz(path: Path, preprocessing: Preprocessing) -> DataSet:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            wanted = [key for key in archive.files if key in (*NPZ_KEYS, "class_names")]
            for key in wanted:
                _check_declared(archive.zip, key)
            arrays = {key: archive[key] for key in wanted}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a readable npz file ({reason})") from error
    missing = [key for key in NPZ_KEYS if key not in arrays]
    if missing:
        raise DataError(f"{path}: lacks {', '.join(missing)}; needs {', '.join(NPZ_KEYS)} and, if wanted, class_names")
    train = Images(arrays["train_images"], arrays["train_labels"], preprocessing, f"{path}: train")
    test = Images(arrays["test_images"], arrays["test_labels"], preprocessing, f"{path}: test")
    names = tuple(map(str, arrays["class_names"])) if "class_names" in arrays else ()
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        raise DataError(f"{path}: train images are {list(train.pixels.shape[1:])}, test images {list(test.pixels.shape[1:])}")
    if names and int(max(train.labels.max(), test.labels.max())) >= len(names):
        raise DataError(f"{path}: {len(names)} class_names, but a label of {int(max(train.labels.max(), test.labels.max()))}")
    return DataSet(f"npz:{path}", train, test, preprocessing, names)


def _check_declared(archive: zipfile.ZipFile, key: str) -> None:
    """Raise ValueError if an array is not as large as it says: numpy allocates what is said before it reads.

    An entry of an archive cannot grow by more than deflate can pack, so that what is read stays in proportion to the file.
    """
    entry = archive.getinfo(f"{key}.npy" if f"{key}.npy" in archive.NameToInfo else key)
    if entry.file_size > PACKED * (entry.compress_size + 1):
        raise ValueError(f"{key} says that it grows from {entry.compress_size} to {entry.file_size} bytes")
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = reader(stream)
        if not kind.hasobject and math.prod(shape) * kind.itemsize != entry.file_size - stream.tell():
            raise ValueError(f"{key} says that it is {kind} {list(shape)}, which is not what it holds")


PACKED = 1100
"""Times that deflate packs zeros, and some more."""


def _torchvision(kind: str, data_dir: str | Path | None, preprocessing: Preprocessing, download: bool) -> DataSet:
    from torchvision import datasets

    if data_dir is None:
        raise DataError(f"{kind} needs --data-dir, the folder in which torchvision keeps (or shall put) its files")
    classes = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
    parts = []
    for train in (True, False):
        try:
            source = classes[kind](str(data_dir), train=train, download=download)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{kind} is not in {data_dir} ({reason}); add --download, or give npz:PATH") from error
        parts.append(Images(np.asarray(source.data), np.asarray(source.targets), preprocessing, f"{kind} in {data_dir}"))
    return DataSet(kind, parts[0], parts[1], preprocessing, tuple(source.classes))


def _imagenet(data_dir: str | Path | None, preprocessing: Preprocessing) -> DataSet:
    if data_dir is None:
        raise DataError("imagenet needs --data-dir, the folder that holds the folders train and val, each with one folder per class")
    found = _image_folder(Path(data_dir), preprocessing)
    if len(found.class_names) != CLASSES:
        raise DataError(
            f"{data_dir} holds {len(found.class_names)} classes, ImageNet has {CLASSES}; for others take imagefolder:{data_dir}"
        )
    return replace(found, name="imagenet")


def _image_folder(path: Path, preprocessing: Preprocessing) -> DataSet:
    from torchvision import datasets

    if len(preprocessing.mean) not in (1, 3) or len(preprocessing.std) not in (1, 3):
        raise DataError(f"{path}: images have 3 channels, but {len(preprocessing.mean)} mean(s) were given")
    transform = preprocessing.transform()
    parts = []
    for split, other in (("train", "train"), ("test", "val")):
        folder = next((path / name for name in (split, other) if (path / name).is_dir()), None)
        if folder is None:
            raise DataError(f"{path}: needs the folders train and test (or val), each with one folder per class")
        try:
            parts.append(datasets.ImageFolder(str(folder), transform, loader=_picture))
        except FileNotFoundError as error:
            raise DataError(f"{folder}: {str(error).splitlines()[0]}") from error
    if parts[0].classes != parts[1].classes:
        strange = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise DataError(f"{path}: the splits hold different classes: {', '.join(strange)} in one only")
    train, test = (Subset(part, mixed_order(part.targets)) for part in parts)
    return DataSet(f"imagefolder:{path}", train, test, preprocessing, tuple(parts[0].classes))


def mixed_order(labels: Sequence[int]) -> list[int]:
    """An order of samples in which every stretch holds each class in proportion to its size; the same at every call.

    Calibration takes the first images of a split and a search the last ones. Shuffling alone would leave about a third of
    ImageNet's classes out of the first thousand.

    Args:
        labels: class of every sample.

    Returns:
        Places in `labels`.
    """
    generator = np.random.default_rng(0)
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(np.asarray(labels)[shuffled], kind="stable")]
    _, counts = np.unique(np.asarray(labels), return_counts=True)
    # The samples of a class stand at equal distances, and those of different classes begin at different places.
    ranks = np.concatenate([(np.arange(count) + start) / count for count, start in zip(counts, generator.random(len(counts)), strict=True)])
    order: list[int] = by_class[np.argsort(ranks, kind="stable")].tolist()
    return order


def _picture(path: str) -> Any:
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except OSError as error:
        raise DataError(f"{path}: not a picture that can be read ({error})") from error
