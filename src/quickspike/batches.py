"""Training batches: shuffled, shared out over processes, put on the device, augmented and normalised there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from quickspike.augmentation import Augmentation
from quickspike.data import DataSet, Images
from quickspike.errors import DataError, QuickspikeError

WORKERS = 2
"""Processes that read pictures from files for a training, unless the data set says how many."""


@dataclass(frozen=True)
class Share:
    """Which part of every batch a process takes."""

    rank: int = 0
    processes: int = 1


class TrainingBatches:
    """The training split of a data set, less a validation part that is held out of it.

    Sets that lie in memory as pixels are moved to the device once. What is drawn for an epoch depends on the seed
    and the number of the epoch alone, so that an interrupted training continues as if nothing had happened.

    Args:
        data: the test images are never touched.
        validation: images held out, drawn once by `seed`.
        batch_size: over all processes together.
        augmentation: applied to pixels in [0, 1], before they are normalised.
        seed: of the split and of the shuffling.
        device: where batches are made.
        share: this process's part.

    Raises:
        DataError: too few images, or a batch that does not divide over the processes.
    """

    def __init__(
        self,
        data: DataSet,
        validation: int,
        batch_size: int,
        augmentation: Augmentation,
        seed: int,
        device: torch.device,
        share: Share | None = None,
    ) -> None:
        self.share = share or Share()
        size = data.size("train")
        if not 0 <= validation < size:
            raise DataError(f"{data.name}: {validation} validation images of {size} training images leave none to train on")
        if batch_size % self.share.processes:
            raise DataError(f"a batch of {batch_size} does not divide over {self.share.processes} processes")
        if size - validation < self.share.processes:
            raise DataError(f"{data.name}: {size - validation} images to train on are fewer than the {self.share.processes} processes")
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        self.held_out = order[:validation].sort().values
        self.indices = order[validation:].sort().values
        self.batch_size = min(batch_size, len(self.indices) - len(self.indices) % self.share.processes)
        self.seed, self.device, self.augmentation = seed, device, augmentation
        self.classes = classes_of(data)
        self._set, self._workers = data.train, data.workers or WORKERS
        self._mean = torch.tensor(data.preprocessing.mean, device=device).view(-1, 1, 1)
        self._std = torch.tensor(data.preprocessing.std, device=device).view(-1, 1, 1)
        if isinstance(data.train, Images):
            self._pixels = data.train.pixels.to(device)
            self._labels = data.train.labels.to(device)

    def example(self) -> Tensor:
        """One training image `[1, C, H, W]`, not augmented."""
        image: Tensor = self._set[int(self.indices[0])][0]
        return image[None].to(self.device)

    def __len__(self) -> int:
        """Batches of an epoch; what is left after the last whole batch comes into play by the next shuffling."""
        return len(self.indices) // self.batch_size

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images `[B, C, H, W]`, targets) of this process; targets are labels `[B]`, or shares `[B, classes]` if mixed."""
        generator = torch.Generator().manual_seed((self.seed << 20) + number)
        order = self.indices[torch.randperm(len(self.indices), generator=generator)]
        chosen = [part[self.share.rank :: self.share.processes] for part in torch.split(order, self.batch_size)[: len(self)]]
        for pixels, labels in self._pixels_of(chosen):
            pixels, targets = self.augmentation.mix(self.augmentation.images(pixels, self._mean.flatten()), labels, self.classes)
            yield ((pixels - self._mean) / self._std).contiguous(memory_format=torch.channels_last), targets

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of this process's share of the held-out part, not augmented."""
        part = self.held_out[self.share.rank :: self.share.processes]
        for pixels, labels in self._pixels_of(list(torch.split(part, self.batch_size))):
            yield ((pixels - self._mean) / self._std).contiguous(memory_format=torch.channels_last), labels

    def _pixels_of(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels in [0, 1] and labels of the images at these indices."""
        if isinstance(self._set, Images):
            for indices in batches:
                indices = indices.to(self.device)
                yield self._pixels[indices].float() / 255, self._labels[indices]
            return
        loader: DataLoader[Any] = DataLoader(_Picked(self._set, batches), batch_size=None, num_workers=self._workers)
        for item in loader:
            if isinstance(item, QuickspikeError):
                raise item
            images, labels = item
            yield images.to(self.device) * self._std + self._mean, labels.to(self.device)


class _Picked(Dataset[Any]):
    """Whole batches as items, so that workers load and stack them; a user's error is handed over as an item too."""

    def __init__(self, images: Dataset[tuple[Tensor, int]], batches: list[Tensor]) -> None:
        self.images, self.batches = images, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | QuickspikeError:
        try:
            items = [self.images[int(i)] for i in self.batches[index]]
        except QuickspikeError as error:
            # Raised in a worker, it would come back with the worker's traceback as its message.
            return error
        return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


def classes_of(data: DataSet) -> int:
    """Number of classes: by name where the set names them, else by its largest label."""
    if data.class_names:
        return len(data.class_names)
    if isinstance(data.train, Images) and isinstance(data.test, Images):
        return int(max(data.train.labels.max(), data.test.labels.max())) + 1
    raise DataError(f"{data.name}: its classes have no names, so their number is not known")
