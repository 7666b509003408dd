"""How a picture becomes the input of a network: size, part, order of the colours, mean and deviation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quickspike.errors import DataError
from quickspike.options import is_finite

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
PART = 2**28
"""Values of the pictures that are resized at a time."""
MOST_PIXELS = 2**14
"""Along a side; a file that asks for more wants memory, not accuracy."""


@dataclass(frozen=True)
class Preprocessing:
    """What a network was trained with, in the order in which it is done."""

    mean: tuple[float, ...]
    """Of pixel/255, for every channel or one for all, in the order that the network sees."""
    std: tuple[float, ...]
    """Standard deviation likewise."""
    resize: int = 0
    """Pixels of the shorter side; 0 leaves the picture as it is."""
    crop: int = 0
    """Pixels of the square that is cut out of the middle; 0 takes all."""
    interpolation: str = "bilinear"
    """nearest, bilinear or bicubic."""
    bgr: bool = False
    """Blue first."""

    def __post_init__(self) -> None:
        if not all(map(is_finite, (*self.mean, *self.std))) or not all(value > 0 for value in self.std):
            raise DataError(f"mean and std must be finite and std > 0, got mean={self.mean}, std={self.std}")
        if any(type(size) is not int or not 0 <= size <= MOST_PIXELS for size in (self.resize, self.crop)):
            raise DataError(f"resize and crop must be numbers of pixels in [0, {MOST_PIXELS}], got {self.resize!r} and {self.crop!r}")
        if self.resize and self.crop > self.resize:
            raise DataError(f"crop={self.crop} is more than resize={self.resize} leaves")
        if type(self.bgr) is not bool:
            raise DataError(f"bgr must be true or false, got {self.bgr!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise DataError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        """What `dataclasses.asdict` gave.

        Raises:
            DataError, KeyError, TypeError, ValueError, OverflowError: it is something else.
        """
        known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        return cls(**{**known, "mean": tuple(map(float, data["mean"])), "std": tuple(map(float, data["std"]))})

    def pixels(self, pictures: Tensor) -> Tensor:
        """Pictures in memory, uint8 `[N, C, H, W]`, all but mean and deviation.

        Raises:
            DataError: the part is larger than the picture.
        """
        from torchvision.transforms.v2 import functional

        if self.resize:
            # torch's "nearest" takes other pixels than PIL's.
            mode = functional.InterpolationMode(self.interpolation.replace("nearest", "nearest-exact"))
            some = max(1, PART // max(1, pictures[0].numel()))
            parts = torch.split(pictures, some)
            pictures = torch.cat([functional.resize(part, [self.resize], interpolation=mode, antialias=True) for part in parts])
        if self.crop:
            pictures = _cut(self.crop, pictures)
        return pictures.flip(1) if self.bgr else pictures

    def transform(self) -> Any:
        """The whole of it for a picture of PIL's, as a torchvision transform."""
        from torchvision.transforms import v2

        mode = v2.InterpolationMode(self.interpolation)
        steps = [v2.Resize(self.resize, interpolation=mode)] if self.resize else []
        steps += [v2.Lambda(partial(_cut, self.crop))] if self.crop else []
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        steps += [v2.Lambda(_flipped)] if self.bgr else []
        return v2.Compose([*steps, v2.Normalize(self.mean, self.std)])


def _cut(side: int, picture: Any) -> Any:
    """The middle of a picture, or of `[..., H, W]`; torchvision would fill up a smaller one with black."""
    from torchvision.transforms.v2 import functional

    height, width = functional.get_size(picture)
    if side > min(height, width):
        raise DataError(f"crop={side} is more than pictures of {height} x {width} pixels hold; resize them")
    return functional.center_crop(picture, [side])


def _flipped(picture: Tensor) -> Tensor:
    return picture.flip(0)


IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=256, crop=224)
PREPROCESSING = {
    "mnist": Preprocessing((0.1307,), (0.3081,)),
    "fashion-mnist": Preprocessing((0.2860,), (0.3530,)),
    "cifar10": Preprocessing((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Preprocessing((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "digits": Preprocessing((0.3053,), (0.3758,)),
    "imagenet": IMAGENET,
    "imagefolder": IMAGENET,
    "npz": Preprocessing((0.5,), (0.5,)),
}
"""Of every kind of data set; means and deviations of its training images."""
