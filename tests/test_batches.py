"""Training batches: every image where it belongs, the same for whoever asks, however many share them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from quickspike.augmentation import Augmentation
from quickspike.batches import Share, TrainingBatches, classes_of
from quickspike.data import DataSet, Images
from quickspike.errors import DataError
from quickspike.preprocessing import Preprocessing

CPU = torch.device("cpu")
PLAIN = Preprocessing((0.0,), (1.0,))
COLOURS = Preprocessing((0.1, 0.2, 0.3), (0.5, 1.5, 2.5))
# Forking workers from a process with threads: Python 3.12 warns of it, PyTorch does it all the same.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def numbered(count: int, preprocessing: Preprocessing = PLAIN, channels: int = 1) -> Images:
    """Random images whose first two pixels spell their index; labels are the index modulo 7."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 4, 4, channels), dtype=np.uint8)
    pixels[:, 0, 0], pixels[:, 0, 1] = (np.arange(count) // 256)[:, None], (np.arange(count) % 256)[:, None]
    return Images(pixels, np.arange(count) % 7, preprocessing, "numbered")


class Plain(Dataset[Any]):
    """Images that do not lie in memory, as far as the batches know."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 1000:
            raise DataError("picture 1000 cannot be read")
        return self.images[index]


def batches(
    images: Any,
    size: int = 8,
    validation: int = 0,
    seed: int = 0,
    share: Share | None = None,
    augmentation: Augmentation | None = None,
    preprocessing: Preprocessing = PLAIN,
) -> TrainingBatches:
    data = DataSet("numbered", images, images, preprocessing, tuple("abcdefg"))
    return TrainingBatches(data, validation, size, augmentation or Augmentation(), seed, CPU, share)


def names(images: Tensor) -> list[int]:
    """Which images these are."""
    pixels = (images[:, 0, 0, :2] * 255).round().int()
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


def epoch(made: TrainingBatches, number: int) -> list[list[int]]:
    return [names(images) for images, _ in made.epoch(number)]


# An epoch


@pytest.mark.parametrize(("count", "size"), [(50, 8), (48, 8), (50, 50), (50, 49), (50, 1), (50, 100), (300, 128)])
def test_an_epoch_visits_every_image_once_but_for_an_incomplete_last_batch(count: int, size: int) -> None:
    made = batches(numbered(count), size)
    size = min(size, count)
    parts = epoch(made, 0)
    assert len(parts) == len(made) == count // size
    assert all(len(part) == size for part in parts)
    visits = Counter(index for part in parts for index in part)
    assert set(visits.values()) == {1}
    assert set(visits) <= set(range(count))


def test_what_one_epoch_leaves_out_comes_into_play_in_another() -> None:
    made = batches(numbered(50), 8)
    left_out = [set(range(50)) - {index for part in epoch(made, number) for index in part} for number in range(8)]
    assert all(len(left) == 2 for left in left_out)
    assert not set.intersection(*left_out)


def test_labels_belong_to_their_images() -> None:
    made = batches(numbered(50), 8, validation=10)
    for images, labels in (*made.epoch(3), *made.validation()):
        assert labels.dtype == torch.int64
        assert labels.tolist() == [index % 7 for index in names(images)]


def test_an_epoch_depends_on_seed_and_number_alone() -> None:
    made = batches(numbered(50))
    orders = [epoch(made, number) for number in range(4)]
    torch.manual_seed(5)
    assert [epoch(batches(numbered(50)), number) for number in (3, 2, 1, 0)] == orders[::-1]
    # Every epoch and every seed shuffles anew, also where seed + epoch is the same.
    others = [epoch(batches(numbered(50), seed=seed), number) for seed in (1, 2) for number in range(4)]
    different = {str(order) for order in (*orders, *others)}
    assert len(different) == 12


def test_shuffling_draws_nothing_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    made = batches(numbered(50), validation=5)
    list(made.epoch(0))
    list(made.validation())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_normalised_as_the_data_set_does_it(channels: int) -> None:
    preprocessing = COLOURS if channels == 3 else Preprocessing((0.3,), (0.4,))
    images = numbered(30, preprocessing, channels)
    made = batches(images, 10, 10, preprocessing=preprocessing)
    raw = {tuple(images.pixels[index].flatten().tolist()): index for index in range(30)}
    for found, labels in (*made.epoch(0), *made.validation()):
        pixels = (found * images.std + images.mean) * 255
        for image, pixel, label in zip(found, pixels.round().int(), labels.tolist(), strict=True):
            index = raw[tuple(pixel.flatten().tolist())]
            torch.testing.assert_close(image, images[index][0], rtol=0, atol=1e-6)
            assert label == images[index][1]


# Validation


def test_the_held_out_part_is_apart_from_what_is_trained_on() -> None:
    made = batches(numbered(100), 10, validation=30)
    held = [index for images, _ in made.validation() for index in names(images)]
    assert len(held) == len(set(held)) == 30
    trained = {index for number in range(6) for part in epoch(made, number) for index in part}
    assert trained == set(range(100)) - set(held)
    assert held == [index for images, _ in batches(numbered(100), 7, validation=30).validation() for index in names(images)]
    other = [index for images, _ in batches(numbered(100), 10, validation=30, seed=1).validation() for index in names(images)]
    assert set(other) != set(held)


def test_training_images_are_augmented_and_validation_images_are_not() -> None:
    images = numbered(40)
    made = batches(images, 10, 10, augmentation=Augmentation(noise=0.3, mixup=1.0))
    for found, labels in made.validation():
        assert labels.shape == (len(found),)
        for image, index in zip(found, names(found), strict=True):
            torch.testing.assert_close(image, images[index][0], rtol=0, atol=1e-6)
    for found, targets in made.epoch(0):
        assert targets.shape == (len(found), 7)
        torch.testing.assert_close(targets.sum(1), torch.ones(len(found)))
        assert max((found - image[0]).abs().amax((1, 2, 3)).min() for image in images) > 0.01


def test_the_hole_of_cutout_has_the_mean_of_the_data_set() -> None:
    """After normalisation it is 0 in every channel."""
    made = batches(numbered(20, COLOURS, 3), 20, augmentation=Augmentation(cutout=4), preprocessing=COLOURS)
    images, _ = next(iter(made.epoch(0)))
    assert float(images.abs().max()) < 1e-6


# Several processes


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("size", [8, 100])
def test_shares_are_disjoint_and_together_the_batch(processes: int, size: int) -> None:
    images = numbered(50)
    whole = batches(images, size, validation=7, share=Share(0, 1))
    shares = [batches(images, size, validation=7, share=Share(rank, processes)) for rank in range(processes)]
    assert {len(share) for share in shares} == {len(whole)} if size == 8 else {1}
    for number in range(2):
        own = [epoch(share, number) for share in shares]
        for parts in zip(*own, strict=True):
            together = [index for part in parts for index in part]
            assert len({len(part) for part in parts}) == 1
            assert len(together) == len(set(together))
        if size == 8:
            for batch, parts in zip(epoch(whole, number), zip(*own, strict=True), strict=True):
                assert sorted(batch) == sorted(index for part in parts for index in part)
    held = sorted(index for share in shares for images, _ in share.validation() for index in names(images))
    assert held == sorted(index for images, _ in whole.validation() for index in names(images))


def test_a_process_may_have_no_validation_image() -> None:
    made = batches(numbered(20), validation=1, share=Share(1, 2))
    assert sum(len(images) for images, _ in made.validation()) == 0


def test_a_batch_that_does_not_divide_over_the_processes_is_refused() -> None:
    with pytest.raises(DataError, match=r"15 .* 2 processes"):
        batches(numbered(50), 15, share=Share(0, 2))


# Images that do not lie in memory


def test_images_from_workers_are_those_from_memory() -> None:
    images = numbered(60, COLOURS, 3)
    memory = batches(images, 12, 10, preprocessing=COLOURS)
    workers = batches(Plain(images), 12, 10, preprocessing=COLOURS)
    for one, other in ((memory.epoch(2), workers.epoch(2)), (memory.validation(), workers.validation())):
        for (expected, labels), (found, found_labels) in zip(one, other, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            assert torch.equal(found_labels, labels)
            assert found.dtype == torch.float32


@pytest.mark.parametrize(("asked", "used"), [(0, 2), (3, 3)])
def test_as_many_workers_read_as_the_data_set_says(asked: int, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def loader(items: Any, *, batch_size: None, num_workers: int) -> Any:
        seen.append(num_workers)
        return [items[index] for index in range(len(items))]

    monkeypatch.setattr("quickspike.batches.DataLoader", loader)
    images = Plain(numbered(30))
    data = DataSet("numbered", images, images, PLAIN, tuple("abcdefg"), asked)
    made = TrainingBatches(data, 5, 10, Augmentation(), 0, CPU)
    assert len(list(made.epoch(0))) == 2
    assert len(list(made.validation())) == 1
    assert seen == [used, used]


def test_images_from_workers_are_augmented_like_those_from_memory() -> None:
    """The pixels are back in [0, 1] there, whatever the preprocessing."""
    images = numbered(24, COLOURS, 3)
    made = batches(Plain(images), 24, augmentation=Augmentation(cutout=4), preprocessing=COLOURS)
    found, _ = next(iter(made.epoch(0)))
    assert float(found.abs().max()) < 1e-5


def test_workers_draw_the_same_for_the_same_seed() -> None:
    made = batches(Plain(numbered(30)), 10, augmentation=Augmentation(noise=0.2))
    drawn = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(2):
            torch.manual_seed(3)
            drawn.append(torch.cat([images for images, _ in made.epoch(1)]))
    assert torch.equal(*drawn)


def test_an_error_of_a_worker_is_one_line() -> None:
    made = batches(Plain(numbered(1001)), 1001)
    with pytest.raises(DataError, match="picture 1000 cannot be read") as caught:
        list(made.epoch(0))
    assert "\n" not in str(caught.value)


# What is refused


@pytest.mark.parametrize("validation", [50, 51, -1])
def test_validation_images_have_to_leave_something_to_train_on(validation: int) -> None:
    with pytest.raises(DataError, match=f"{validation} validation images of 50"):
        batches(numbered(50), validation=validation)


def test_fewer_images_than_processes_are_refused() -> None:
    with pytest.raises(DataError):
        len(batches(numbered(50), validation=49, share=Share(0, 2)))


def test_the_number_of_classes() -> None:
    images, few = numbered(10), numbered(3)
    preprocessing = Preprocessing((0.0,), (1.0,))
    assert classes_of(DataSet("named", images, images, preprocessing, tuple("abcdefghi"))) == 9
    assert classes_of(DataSet("unnamed", images, few, preprocessing)) == 7
    assert classes_of(DataSet("unnamed", few, images, preprocessing)) == 7
    with pytest.raises(DataError, match="names"):
        classes_of(DataSet("unknown", Plain(images), Plain(images), preprocessing))
