"""Augmentation: what each option may do to an image, that images differ, that a seed repeats a batch, and what is refused."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quickspike.augmentation import STANDARD, STRONG, Augmentation
from quickspike.errors import DataError, OptionError

POLICIES = ("autoaugment", "randaugment", "trivialaugment")
EACH: dict[str, dict[str, Any]] = {
    "flip": {"flip": True},
    "crop": {"crop": 3},
    "cutout": {"cutout": 5},
    **{policy: {"policy": policy} for policy in POLICIES},
    "rotation": {"rotation": 20.0},
    "noise": {"noise": 0.1},
    "all": {"flip": True, "crop": 3, "cutout": 5, "policy": "autoaugment", "rotation": 20.0, "noise": 0.1},
}


def pictures(number: int, channels: int = 3, height: int = 12, width: int = 10, seed: int = 0) -> Tensor:
    """No pixel is 0, so that black can only come from an augmentation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, channels, height, width, generator=generator) * 0.8 + 0.1


def twins(number: int = 64, **shape: int) -> Tensor:
    return pictures(1, **shape).repeat(number, 1, 1, 1)


def seeded(augmentation: Augmentation, x: Tensor, seed: int = 0, **more: Any) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return augmentation.images(x, **more)


def mixed(augmentation: Augmentation, x: Tensor, labels: Tensor, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return augmentation.mix(x, labels, classes)


# All options alike


@pytest.mark.parametrize("options", EACH.values(), ids=EACH)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_keep_their_form_and_range_and_the_input_is_left_alone(options: dict[str, Any], channels: int) -> None:
    x = pictures(6, channels)
    before = x.clone()
    for seed in range(3):
        out = seeded(Augmentation(**options), x, seed)
        assert (out.shape, out.dtype, out.stride()) == (x.shape, x.dtype, x.stride())
        assert out is not x
        assert torch.equal(x, before)
        assert float(out.min()) >= 0
        assert float(out.max()) <= 1 + 1e-6


@pytest.mark.parametrize("options", EACH.values(), ids=EACH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_type_and_memory_layout_stay(options: dict[str, Any], dtype: torch.dtype) -> None:
    x = pictures(4).to(dtype).contiguous(memory_format=torch.channels_last)
    out = seeded(Augmentation(**options), x)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", EACH.values(), ids=EACH)
def test_only_torchs_seed_counts(options: dict[str, Any]) -> None:
    augmentation, x = Augmentation(**options), pictures(16)
    random.seed(1)
    np.random.seed(1)
    one = seeded(augmentation, x)
    states = random.getstate(), np.random.get_state()[1].copy()
    two = seeded(augmentation, x)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    random.seed(2)
    np.random.seed(2)
    assert torch.equal(one, two)
    assert torch.equal(one, seeded(Augmentation(**options), x))
    assert not torch.equal(one, seeded(augmentation, x, seed=1))


@pytest.mark.parametrize("options", EACH.values(), ids=EACH)
def test_each_image_has_its_own_draw(options: dict[str, Any]) -> None:
    out = seeded(Augmentation(**options), twins())
    assert len(out.unique(dim=0)) >= (2 if options == {"flip": True} else 12)


def test_a_group_shares_a_draw_of_the_policy() -> None:
    out = seeded(Augmentation(policy="trivialaugment", policy_group=4), twins(30))
    groups = out.split(4)
    assert [len(group.unique(dim=0)) for group in groups] == [1] * 8
    assert len(torch.stack([group[0] for group in groups]).unique(dim=0)) >= 4


def test_off_is_the_same_object() -> None:
    x, labels, off = pictures(4), torch.tensor([0, 1, 2, 0]), Augmentation()
    state = torch.get_rng_state()
    assert off.images(x) is x
    assert Augmentation(mixup=1.0).images(x) is x
    assert off.mix(x, labels, 3)[0] is x
    assert STRONG.mix(x, labels, 3)[1] is labels
    assert torch.equal(torch.get_rng_state(), state)


def test_importing_it_imports_no_library_of_transforms() -> None:
    code = "import sys, quickspike.augmentation; sys.exit(bool({'kornia', 'torchvision'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Flip, crop, rotation


@pytest.mark.parametrize("channels", [1, 3])
def test_flip_mirrors_about_half_of_the_images(channels: int) -> None:
    x = pictures(400, channels)
    out = seeded(Augmentation(flip=True), x)
    kept, mirrored = (out == x).flatten(1).all(1), (out == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(kept, ~mirrored)
    assert 150 < int(kept.sum()) < 250


@pytest.mark.parametrize("number", [1, 1500])
def test_crop_is_one_of_the_81_windows_of_the_padded_image(number: int) -> None:
    x = pictures(number)
    out = seeded(Augmentation(crop=4), x)
    padded = F.pad(x, [4, 4, 4, 4])
    windows = {(top, left): padded[..., top : top + 12, left : left + 10] for top in range(9) for left in range(9)}
    matches = torch.stack([(out == window).flatten(1).all(1) for window in windows.values()])
    assert torch.equal(matches.sum(0), torch.ones(number, dtype=torch.long))
    # With 1500 images some window is missed in less than one of a million runs.
    assert number == 1 or matches.any(1).all()


def test_rotation_turns_no_further_than_asked_and_both_ways() -> None:
    ramp = torch.linspace(-0.25, 0.25, 33)
    upward = (0.5 + ramp[:, None].expand(33, 33)).expand(200, 1, 33, 33)
    out = seeded(Augmentation(rotation=30.0), upward)[:, 0]
    # In the turned ramp the gradient at the centre has the direction of the turned axis.
    down = out[:, 18, 16] - out[:, 14, 16]
    across = out[:, 16, 18] - out[:, 16, 14]
    angles = torch.rad2deg(torch.atan2(across, down))
    assert -30.1 < float(angles.min()) < -25
    assert 25 < float(angles.max()) < 30.1
    assert float(angles.abs().min()) < 3


# Holes and noise


@pytest.mark.parametrize("side", [1, 5, 9])
def test_cutout_is_one_square_hole_in_the_mean_colour(side: int) -> None:
    x = pictures(300, 3, 9, 11)
    mean = torch.tensor([2.0, 3.0, 4.0])
    out = seeded(Augmentation(cutout=side), x, mean=mean)
    hole = out[:, 0] > 1
    assert torch.equal(out, torch.where(hole[:, None], mean.view(3, 1, 1), x))
    rows, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, rows[:, :, None] & columns[:, None, :])
    for lines in (rows, columns):
        assert (lines.sum(1) == side).all()
        first, last = lines.int().argmax(1), lines.shape[1] - 1 - lines.flip(1).int().argmax(1)
        assert (last - first == side - 1).all()
        assert set(first.tolist()) == set(range(lines.shape[1] - side + 1))


def test_cutout_fills_with_the_mean_of_the_batch_before_it_was_cropped() -> None:
    x = pictures(50)
    out = seeded(Augmentation(cutout=4, crop=3), x)
    centre = x.mean((0, 2, 3)).view(3, 1, 1)
    assert ((out == centre).all(1).flatten(1).sum(1) == 16).all()


@pytest.mark.parametrize("mean", [[0.25], torch.full((1, 1, 1), 0.25), [0.25, 0.25, 0.25], torch.full((3, 1, 1), 0.25)])
def test_forms_of_the_mean(mean: Any) -> None:
    out = seeded(Augmentation(cutout=4), pictures(5), mean=mean)
    assert ((out == 0.25).all(1).flatten(1).sum(1) == 16).all()


def test_noise_has_the_stated_deviation_and_stays_within_the_range() -> None:
    grey = torch.full((20, 3, 16, 16), 0.5)
    change = seeded(Augmentation(noise=0.05), grey) - grey
    assert float(change.std()) == pytest.approx(0.05, rel=0.03)
    assert float(change.mean()) == pytest.approx(0, abs=0.002)
    white = seeded(Augmentation(noise=0.5), torch.ones(2, 1, 8, 8))
    assert float(white.max()) == 1


# Policies


def test_brightness_of_a_policy_scales() -> None:
    """A brightness that adds, as kornia's does, would give grey pictures here: the only other way up is to invert."""
    out = seeded(Augmentation(policy="trivialaugment"), torch.full((600, 3, 8, 8), 0.1))
    assert ((out < 0.21) | (out > 0.85)).all()
    assert float(((out > 0.11) & (out < 0.21)).float().mean()) > 0.01


# Mixing


def test_mixup_is_convex_in_images_and_targets() -> None:
    x, labels = pictures(8).double(), torch.arange(8) % 5
    lambdas = []
    for seed in range(20):
        out, targets = mixed(Augmentation(mixup=0.4), x, labels, 5, seed)
        assert (targets.shape, targets.dtype) == (torch.Size([8, 5]), torch.float32)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        other = x.roll(1, 0)
        share = float(((out - other) * (x - other)).sum() / (x - other).square().sum())
        lambdas.append(share)
        torch.testing.assert_close(out, share * x + (1 - share) * other)
        one_hot = F.one_hot(labels, 5).float()
        torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot.roll(1, 0))
    assert 0 <= min(lambdas) < max(lambdas) <= 1
    assert len(set(lambdas)) == 20


def test_cutmix_targets_are_the_areas() -> None:
    x, labels = pictures(7), torch.arange(7)
    areas = []
    for seed in range(20):
        out, targets = mixed(Augmentation(cutmix=1.0), x, labels, 7, seed)
        pasted = (out != x).any(1)
        assert torch.equal(out, torch.where(pasted[:, None], x.roll(1, 0), x))
        assert (pasted == pasted[0]).all()
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        assert torch.equal(pasted[0], rows[:, None] & columns)
        area = float(pasted[0].sum()) / (12 * 10)
        areas.append(area)
        identity = torch.eye(7)
        torch.testing.assert_close(targets, (1 - area) * identity + area * identity.roll(1, 0))
    assert len(set(areas)) > 10


@pytest.mark.parametrize("options", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}], ids=str)
def test_mixing_repeats_with_the_seed_and_leaves_its_input_alone(options: dict[str, float]) -> None:
    x, labels = pictures(6), torch.tensor([0, 1, 2, 2, 1, 0])
    before = x.clone()
    one, two, other = (mixed(Augmentation(**options), x, labels, 3, seed) for seed in (1, 1, 2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])
    assert torch.equal(x, before)
    assert torch.equal(labels, torch.tensor([0, 1, 2, 2, 1, 0]))


def test_a_coin_decides_between_mixup_and_cutmix() -> None:
    x, labels = pictures(2), torch.tensor([0, 1])
    both = Augmentation(mixup=1.0, cutmix=1.0)
    cuts = 0
    for seed in range(100):
        out, _ = mixed(both, x, labels, 2, seed)
        cuts += bool(((out == x) | (out == x.roll(1, 0))).all())
    assert 30 < cuts < 70


# What is refused


@pytest.mark.parametrize(
    "options",
    [
        {"flip": 1},
        {"crop": -1},
        {"crop": 2.5},
        {"cutout": -1},
        {"policy": "auto"},
        {"policy_group": 0},
        {"rotation": 181.0},
        {"rotation": float("nan")},
        {"noise": -0.1},
        {"mixup": -1.0},
        {"mixup": 1e-6},
        {"cutmix": "1"},
        {"cutmix": 1e-6},
    ],
    ids=str,
)
def test_invalid_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"^augmentation: {next(iter(options))} must be "):
        Augmentation(**options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"floating point in \[0, 1\], got torch.uint8; divide 0 to 255 by 255"),
        (torch.full((2, 3, 8, 8), 255.0), r"must lie in \[0, 1\], got 255 to 255; augment first, then normalise"),
        (torch.full((2, 3, 8, 8), -0.5), r"must lie in \[0, 1\], got -0.5"),
        (torch.full((2, 3, 8, 8), float("nan")), r"must lie in \[0, 1\], got nan"),
        (torch.rand(3, 8, 8), r"\[B, C, H, W\] and not empty, got \[3, 8, 8\]"),
        (torch.rand(0, 3, 8, 8), r"not empty, got \[0, 3, 8, 8\]"),
    ],
)
def test_images_of_the_wrong_kind_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        STANDARD.images(x)


def test_what_a_normalisation_taken_back_leaves_is_not_refused() -> None:
    STANDARD.images(torch.full((1, 3, 8, 8), 1 + 1e-6))


@pytest.mark.parametrize(
    ("options", "channels", "message"),
    [
        ({"crop": 8}, 3, r"crop 8 leaves nothing of images \[2, 3, 8, 9\]; it must be less than 8"),
        ({"cutout": 9}, 3, r"cutout 9 does not fit into images \[2, 3, 8, 9\]; the largest is 8"),
        ({"policy": "randaugment"}, 2, r"policy 'randaugment' takes images of 1 or 3 channels, got \[2, 2, 8, 9\]; use policy='none'"),
    ],
)
def test_images_that_an_option_does_not_fit_are_refused(options: dict[str, Any], channels: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Augmentation(**options).images(torch.rand(2, channels, 8, 9))


def test_a_mean_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(DataError, match=r"2 mean values for images \[4, 3, 12, 10\]; give one, or one per channel"):
        Augmentation(cutout=2).images(pictures(4), mean=[0.1, 0.2])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1]), r"labels must be int64 \[3\], got torch.int64 \[2\]"),
        (torch.tensor([0.0, 1.0, 2.0]), "labels must be int64"),
        (torch.tensor([0, 1, 3]), "labels must lie in 0 to 2, got 0 to 3"),
        (torch.tensor([0, -1, 2]), "labels must lie in 0 to 2, got -1 to 2"),
    ],
)
def test_labels_that_cannot_be_mixed_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Augmentation(mixup=1.0).mix(pictures(3), labels, 3)


def test_presets_are_plain_options() -> None:
    assert Augmentation(**dataclasses.asdict(STANDARD)) == STANDARD
    assert (STANDARD.flip, STANDARD.crop, STRONG.cutout) == (True, 4, 8)
