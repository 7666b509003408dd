"""Images and labels that a newcomer gives by mistake: each is refused by name, or converted with a warning that says why."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import quickspike as qs
from quickspike.api import train
from quickspike.augmentation import Augmentation
from quickspike.data import DataSet, Images, load_data
from quickspike.errors import QuickspikeError
from quickspike.evaluation import make_fabric
from quickspike.preprocessing import Preprocessing
from quickspike.training import Trainer, Training
from trials import Fault, Trial, warned

Expected = Literal["refused", "warned"]
NAN, INFINITE = float("nan"), float("inf")


@contextlib.contextmanager
def inside(folder: str | Path) -> Iterator[None]:
    """Work in a folder meanwhile."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# What is right: a network that was trained on normalised pictures of three channels, and such pictures


@functools.cache
def pixels() -> Tensor:
    """Pictures [N, 3, 8, 8], uint8: blobs of a colour for each of two classes."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(64, 3, 2, 2, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    noise = torch.rand(64, 3, 8, 8, generator=generator)
    return ((0.7 * base + 0.3 * noise) * 255).to(torch.uint8)


def images() -> Tensor:
    return (pixels() / 255 - 0.5) / 0.25


def labels() -> Tensor:
    return torch.arange(64) % 2


@functools.cache
def network() -> nn.Module:
    """Convolution, batch norm that has seen the pictures often, and a head."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    with torch.no_grad():
        for _ in range(60):
            layers(images())
    return layers.eval()


@functools.cache
def flat() -> nn.Module:
    """Takes pictures of any order of axes, since it flattens them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


@functools.cache
def spiking() -> qs.SpikingNetwork:
    return qs.convert(network(), images(), steps=2)


# Ways in


def calibrate(given: Any) -> None:
    qs.convert(network(), given, steps=2)


def calibrate_flat(given: Any) -> None:
    qs.convert(flat(), given, steps=2)


def evaluate(given: Any) -> None:
    qs.evaluate(spiking(), given, steps=(1, 2), device="cpu")


def call(given: Any) -> None:
    with torch.no_grad():
        spiking()(given)


def learn(given: Any) -> None:
    settings = Training(epochs=1, batch_size=8)
    train(network(), Trainer(fabric=make_fabric("cpu"), data=_data_set(given), settings=settings, augmentation=Augmentation()))


def _data_set(given: Any) -> DataSet:
    prepared = Preprocessing((0.5,), (0.25,))
    split = Images(*given, prepared, "given")
    return DataSet("given", split, split, prepared)


def limited(given: Any) -> None:
    next(iter(_data_set(given).loader("train", limit=16)))


def from_file(given: Any) -> None:
    """An archive of images, whose reader looks at every rule of `Images`."""
    train, labels = given
    path = Path("wrong.npz")
    np.savez(path, train_images=train, train_labels=labels, test_images=train, test_labels=labels)
    try:
        load_data(f"npz:{path}")
    finally:
        path.unlink()


# The mistakes


@dataclass(frozen=True)
class Mistake:
    """Something wrong, given in some way, and what is to be said about it."""

    kind: str
    way: Callable[[Any], None]
    given: Callable[[], Any]
    expected: Expected
    says: str
    """Regular expression of the error, or of the warning."""


def _with(value: float) -> Tensor:
    changed = images().clone()
    changed[3, 1, 2, 2] = value
    return changed


def _pairs(given: Tensor, classes: Any = None) -> list[Any]:
    return [(given, labels() if classes is None else classes)]


def _sorted() -> tuple[np.ndarray, np.ndarray]:
    return pixels().permute(0, 2, 3, 1).numpy(), np.sort(labels().numpy())


def _plain(change: Callable[[np.ndarray], np.ndarray], relabel: Callable[[np.ndarray], np.ndarray] = lambda one: one) -> Any:
    return change(pixels().permute(0, 2, 3, 1).numpy()), relabel(labels().numpy())


def _mistakes() -> Iterator[Mistake]:
    for name, value in (("NaN", NAN), ("infinite", INFINITE), ("minus infinite", -INFINITE)):
        yield Mistake(name, calibrate, functools.partial(_with, value), "refused", "NaN or infinite")
        yield Mistake(name, evaluate, lambda value=value: _pairs(_with(value)), "refused", "evaluation batch 1.*NaN or infinite")
    for way, wrap in ((calibrate, lambda one: one), (evaluate, _pairs)):
        yield Mistake("nothing but NaN", way, lambda wrap=wrap: wrap(images() * NAN), "refused", "NaN or infinite")
        yield Mistake("no images", way, lambda wrap=wrap: wrap(images()[:0]), "refused", "at least one sample")
        yield Mistake("no batches", way, list, "refused", "is empty")
        yield Mistake("bytes", way, lambda wrap=wrap: wrap(pixels()), "refused", "floating point, got torch.uint8; scale and normalise")
        yield Mistake("whole numbers", way, lambda wrap=wrap: wrap(pixels().long()), "refused", "floating point, got torch.int64")
        yield Mistake("truth values", way, lambda wrap=wrap: wrap(pixels() > 9), "refused", "floating point, got torch.bool")
        yield Mistake(
            "complex", way, lambda wrap=wrap: wrap(images().to(torch.complex64)), "refused", "floating point, got torch.complex64"
        )
        yield Mistake("0 to 255", way, lambda wrap=wrap: wrap(pixels().float()), "warned", "between 0 and 255.*divide by 255")
        yield Mistake("grey", way, lambda wrap=wrap: wrap(images()[:, :1]), "refused", "channel|shape")
        yield Mistake("one axis", way, lambda wrap=wrap: wrap(images().flatten()), "refused", "shape|labels")
        yield Mistake("no batch axis", way, lambda wrap=wrap: wrap(images()[0]), "refused", "shape|labels|cannot run")
        yield Mistake("channels last", way, lambda wrap=wrap: wrap(images().permute(0, 2, 3, 1)), "refused", r"permute\(0, 3, 1, 2\)")
    yield Mistake("numpy array", calibrate, lambda: images().numpy(), "refused", "must be a tensor|ndarray")
    yield Mistake("texts", calibrate, lambda: ["a", "b"], "refused", "batch 1 is a str")
    yield Mistake("a number", calibrate, lambda: 3, "refused", "iterable of batches")
    yield Mistake("a data set", calibrate, lambda: Images(*_plain(lambda one: one), Preprocessing((0.5,), (0.25,)), "x"), "refused", "")
    yield Mistake("other sizes", calibrate, lambda: [images(), images()[:, :, :4]], "refused", "batch 2 holds samples of shape")
    yield Mistake("0 to 1", calibrate, lambda: pixels() / 255, "warned", "do not look like those .* trained on.*normalise")
    yield Mistake("0 to 255 once normalised", calibrate, lambda: pixels().float() - 127, "warned", "do not look like those .* trained on")
    yield Mistake("normalised twice", calibrate, lambda: (images() - 0.5) / 0.25, "warned", "do not look like those .* trained on")
    yield Mistake("channels last", calibrate_flat, lambda: images().permute(0, 2, 3, 1), "warned", r"\[B, H, W, C\].*permute\(0, 3, 1, 2\)")
    yield Mistake("bytes", call, pixels, "refused", "floating point, got torch.uint8; scale and normalise")
    yield Mistake("channels last", call, lambda: images().permute(0, 2, 3, 1), "refused", r"permute\(0, 3, 1, 2\)")
    yield Mistake("no batch axis", call, lambda: images()[0], "refused", "takes images of shape")
    yield Mistake("no images", call, lambda: images()[:0], "refused", "takes images of shape")

    yield Mistake("one class", evaluate, lambda: _pairs(images(), labels() * 0 + 1), "warned", "all 64 .*of class 1")
    yield Mistake("one class", learn, lambda: _plain(lambda one: one, lambda one: one * 0), "refused", "all of class 0.*nothing to learn")
    yield Mistake("sorted by class", limited, _sorted, "warned", "first 16 train images.*all of class 0")
    yield Mistake("no labels", evaluate, lambda: [images()], "refused", "has no labels")
    yield Mistake("labels too large", evaluate, lambda: _pairs(images(), labels() + 5), "refused", "do not fit a network with 2 classes")
    yield Mistake("labels below 0", evaluate, lambda: _pairs(images(), labels() - 1), "refused", "do not fit a network with 2 classes")
    yield Mistake("labels that are fractions", evaluate, lambda: _pairs(images(), labels() / 2), "refused", "whole numbers")
    yield Mistake("labels that are NaN", evaluate, lambda: _pairs(images(), labels() * NAN), "refused", "whole numbers")
    yield Mistake("one-hot labels", evaluate, lambda: _pairs(images(), torch.eye(2).long()[labels()]), "refused", "labels must be")
    yield Mistake("fewer labels", evaluate, lambda: _pairs(images(), labels()[:9]), "refused", "labels must be 64")
    yield Mistake("labels that are words", evaluate, lambda: [(images(), ["cat"] * 64)], "refused", "labels")

    yield Mistake("NaN", from_file, lambda: _plain(lambda one: one * NAN), "refused", "must be uint8")
    yield Mistake("0 to 1", from_file, lambda: _plain(lambda one: one / 255), "refused", "must be uint8.*got float64.*0 to 255")
    yield Mistake("floats 0 to 255", from_file, lambda: _plain(lambda one: one.astype(np.float32)), "refused", "must be uint8.*float32")
    yield Mistake("channels first", from_file, lambda: _plain(lambda one: one.transpose(0, 3, 1, 2)), "refused", r"transpose\(0, 2, 3, 1\)")
    yield Mistake("no images", from_file, lambda: _plain(lambda one: one[:0], lambda one: one[:0]), "refused", "holds no images")
    yield Mistake("fewer labels", from_file, lambda: _plain(lambda one: one, lambda one: one[:9]), "refused", "labels must be 64")
    yield Mistake("labels that are NaN", from_file, lambda: _plain(lambda one: one, lambda one: one * NAN), "refused", "whole numbers")
    yield Mistake(
        "one-hot labels", from_file, lambda: _plain(lambda one: one, lambda one: np.eye(2, dtype=int)[one]), "refused", "whole numbers"
    )


MISTAKES = tuple(_mistakes())


def judged(mistake: Mistake) -> str:
    """What came of a mistake, as an error of the package or as "warned".

    Raises:
        QuickspikeError: it was refused, as expected.
        Fault: it was not, or otherwise than expected.
    """
    with warned() as texts:
        try:
            mistake.way(mistake.given())
        except QuickspikeError as error:
            if mistake.expected != "refused" or not re.search(mistake.says, str(error)):
                raise Fault(f"refused with {error}, wanted is: {mistake.expected}, {mistake.says!r}") from error
            raise
    if mistake.expected != "warned":
        raise Fault(f"taken as if nothing were wrong (warnings: {texts})")
    if not any(re.search(mistake.says, text) for text in texts):
        raise Fault(f"no warning that says {mistake.says!r}, but {texts}")
    return "warned"


def trials() -> list[Trial]:
    return [Trial(f"{one.way.__name__}: {one.kind}", lambda path, one=one: judged(one), names_file=False) for one in MISTAKES]
