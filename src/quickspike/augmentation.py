"""What happens to training images: flips, crops, holes, published policies, mixing; on their device, each image on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quickspike.errors import DataError, OptionError
from quickspike.options import option, validate

_ROUNDING = 1e-3
"""How far a pixel may lie outside [0, 1]: taking a normalisation back does not give the exact pixel."""
_SMALLEST_ALPHA = 1e-3
"""In float32, draws from Beta(alpha, alpha) collapse to 1/2 below 1e-5, the very opposite of what they tend to."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of training images, applied in the order of the options.

    All randomness comes from torch's global generators: seed or fork them for reproducible batches. Flip, crop, rotation
    and the place of the hole are kornia's; the policies and the mixing are torchvision's.

    Differs from the papers: the hole of cutout always lies wholly inside the image, and what the policies move in from
    outside is black.

    Raises:
        OptionError: an option is out of range.
    """

    name: ClassVar[str] = "augmentation"

    flip: bool = option(False, "mirror every second image, left to right, at random")
    crop: int = option(
        0, "black border that is added before a window of the old size is cut out; 0 for none", unit="pixels", low=0, high=4096
    )
    rotation: float = option(0.0, "largest angle to either side; corners turn black; 0 for none", unit="degrees", low=0, high=180)
    policy: Literal["none", "autoaugment", "randaugment", "trivialaugment"] = option(
        "none", "published policy: AutoAugment's for CIFAR-10, RandAugment with 2 operations of magnitude 9 of 30, or TrivialAugment (wide)"
    )
    policy_group: int = option(1, "images that share a draw of the policy; more are faster", unit="images", low=1, high=2**20)
    noise: float = option(0.0, "standard deviation of Gaussian noise on pixels in [0, 1]; 0 for none", low=0, high=1)
    cutout: int = option(0, "side of a square hole, filled with the mean pixel; 0 for none", unit="pixels", low=0, high=4096)
    mixup: float = option(0.0, "alpha of Beta(alpha, alpha) by which mixup blends images and labels; 0 for none", low=0, high=1000)
    cutmix: float = option(0.0, "alpha of Beta(alpha, alpha) by which cutmix pastes a box of another image; 0 for none", low=0, high=1000)

    def __post_init__(self) -> None:
        validate(self)
        for option_name in ("mixup", "cutmix"):
            alpha = getattr(self, option_name)
            if 0 < alpha < _SMALLEST_ALPHA:
                raise OptionError(f"{self.name}: {option_name} must be 0 or at least {_SMALLEST_ALPHA}, got {alpha!r}")

    def images(self, x: Tensor, mean: Tensor | Sequence[float] | None = None) -> Tensor:
        """Change every image by a draw of its own; with `policy_group` > 1, groups in the batch share that of the policy.

        Args:
            x: pixels in [0, 1], `[B, C, H, W]`, of any floating type. Left as it is.
            mean: what fills the hole of `cutout`, one value or one per channel; by default the mean pixel of `x`.

        Returns:
            Same shape, type, device and memory layout; `x` itself if nothing is to be done.

        Raises:
            DataError: `x` is something else, or too small for the options.
        """
        if not (self.flip or self.crop or self.rotation or self.policy != "none" or self.noise or self.cutout):
            return x
        _check_images(x)
        self._check_size(x)
        out = self._moved(x)
        out = _with_policy(out, self.policy, self.policy_group)
        if self.noise:
            # On the device of the images; kornia's noise is drawn on the host, and leaves [0, 1].
            out = (out + self.noise * torch.randn_like(out)).clamp(0, 1)
        if self.cutout:
            # Not the mean of `out`, which the black of the crop has darkened.
            out = _with_hole(out, self.cutout, x.mean((0, 2, 3)) if mean is None else mean)
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return out.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def mix(self, x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Mix every image with the one before it in the batch, which has to be in random order.

        mixup (Zhang et al. 2018, arXiv 1710.09412) blends whole images, cutmix (Yun et al. 2019, arXiv 1905.04899)
        pastes a box. Lambda, and the box, are drawn once per batch, as in the authors' code. With both on, a coin
        decides for each batch.

        Args:
            x: `[B, C, H, W]`, floating. Left as it is.
            labels: int64 `[B]`.
            classes: how many there are.

        Returns:
            Images, and the share of each class `[B, classes]` in float32; `x` and `labels` themselves if mixing is off.

        Raises:
            DataError: `x` or `labels` is something else.
        """
        if not (self.mixup or self.cutmix):
            return x, labels
        _check_labels(x, labels, classes)
        from torchvision.transforms import v2

        cut = not self.mixup or (bool(self.cutmix) and float(torch.rand(())) < 0.5)
        mixing = v2.CutMix(alpha=self.cutmix, num_classes=classes) if cut else v2.MixUp(alpha=self.mixup, num_classes=classes)
        mixed, targets = mixing(x, labels)
        return mixed, targets

    def _check_size(self, x: Tensor) -> None:
        channels, side = x.shape[1], min(x.shape[2:])
        if self.crop >= side:
            raise DataError(f"augmentation: crop {self.crop} leaves nothing of images {_shape(x)}; it must be less than {side}")
        if self.cutout > side:
            raise DataError(f"augmentation: a hole of cutout {self.cutout} does not fit into images {_shape(x)}; the largest is {side}")
        if self.policy != "none" and channels not in (1, 3):
            raise DataError(f"augmentation: policy {self.policy!r} takes images of 1 or 3 channels, got {_shape(x)}; use policy='none'")

    def _moved(self, x: Tensor) -> Tensor:
        import kornia.augmentation as kornia

        moves: list[Any] = []
        if self.flip:
            moves.append(kornia.RandomHorizontalFlip(p=0.5))
        if self.crop:
            moves.append(kornia.RandomCrop((x.shape[2], x.shape[3]), padding=self.crop, cropping_mode="slice"))
        if self.rotation:
            moves.append(kornia.RandomRotation(float(self.rotation), p=1.0))
        for move in moves:
            x = move(x)
        return x


STANDARD = Augmentation(flip=True, crop=4)
"""What small colour pictures such as CIFAR-10 are usually trained with."""
STRONG = Augmentation(flip=True, crop=4, policy="autoaugment", cutout=8)
"""For long trainings of large networks, which learn the training images by heart otherwise."""


def _with_policy(x: Tensor, policy: str, group: int) -> Tensor:
    """Apply a policy with one draw per `group` images.

    torchvision's, since those of kornia 0.9 are not the published ones: brightness adds instead of scaling, contrast
    scales around black, shear 0.3 becomes 54 degrees.
    """
    if policy == "none":
        return x
    from torchvision.transforms import v2

    if policy == "autoaugment":
        draw: Any = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    else:
        draw = v2.RandAugment(num_ops=2, magnitude=9) if policy == "randaugment" else v2.TrivialAugmentWide()
    return torch.cat([draw(part) for part in torch.split(x, group)])


def _with_hole(x: Tensor, side: int, fill: Tensor | Sequence[float]) -> Tensor:
    """Fill one square of every image, wholly inside it, with `fill` `[C]` or `[1]`."""
    import kornia.augmentation as kornia

    colour = torch.as_tensor(fill, dtype=x.dtype, device=x.device).reshape(-1, 1, 1)
    if len(colour) not in (1, x.shape[1]):
        raise DataError(f"augmentation: {len(colour)} mean values for images {_shape(x)}; give one, or one per channel")
    batch, _, height, width = x.shape
    share = side * side / (height * width)
    # kornia fills with one number for all channels, so it only says where the hole is. In float32 whatever the type
    # of `x`: half precision does not hold every coordinate of a large image.
    erase = kornia.RandomErasing(scale=(share, share), ratio=(1.0, 1.0), value=0.0, p=1.0)
    kept = erase(torch.ones(batch, 1, height, width, device=x.device))
    return torch.where(kept.bool(), x, colour)


def _shape(x: Tensor) -> str:
    return f"[{', '.join(map(str, x.shape))}]"


def _check_images(x: Tensor) -> None:
    if x.ndim != 4 or not x.numel():
        raise DataError(f"augmentation: images must be [B, C, H, W] and not empty, got {_shape(x)}")
    if not x.is_floating_point():
        raise DataError(f"augmentation: images must be floating point in [0, 1], got {x.dtype}; divide 0 to 255 by 255")
    low, high = torch.stack(x.aminmax()).tolist()
    # So written that NaN fails too.
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise DataError(f"augmentation: pixels must lie in [0, 1], got {low:g} to {high:g}; augment first, then normalise")


def _check_labels(x: Tensor, labels: Tensor, classes: int) -> None:
    if x.ndim != 4 or not x.numel() or not x.is_floating_point():
        raise DataError(f"augmentation: images to mix must be floating point [B, C, H, W], got {x.dtype} {_shape(x)}")
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        raise DataError(f"augmentation: labels must be int64 [{len(x)}], got {labels.dtype} {_shape(labels)}")
    low, high = torch.stack(labels.aminmax()).tolist()
    if low < 0 or high >= classes:
        raise DataError(f"augmentation: labels must lie in 0 to {classes - 1}, got {low} to {high}")
