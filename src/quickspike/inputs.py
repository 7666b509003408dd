"""Networks of several inputs as networks of one, which is what everything else here works on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quickspike.errors import DataError, OptionError


class OneInput(nn.Module):
    """A network of several inputs that takes them side by side in one tensor, `[B, N]`.

    Args:
        model: its forward pass takes tensors `[B, *shape]`, in the order of `shapes`; shared, not copied.
        shapes: of one sample of every input, without the batch axis.

    Raises:
        OptionError: a shape holds something else than sizes >= 1.
    """

    def __init__(self, model: nn.Module, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.model, self.shapes = model, tuple(tuple(shape) for shape in shapes)
        sizes = [size for shape in self.shapes for size in shape]
        if not self.shapes or any(type(size) is not int or size < 1 for size in sizes):
            raise OptionError(f"shapes must be tuples of sizes >= 1, one for every input, got {shapes!r}")

    def pack(self, *inputs: Tensor) -> Tensor:
        """The inputs `[B, *shape]` as one tensor `[B, N]`.

        Raises:
            DataError: they do not fit the shapes, or each other.
        """
        found = [tuple(one.shape[1:]) for one in inputs]
        if found != list(self.shapes) or len({len(one) for one in inputs}) != 1:
            wanted = ", ".join(f"[{', '.join(map(str, ('B', *shape)))}]" for shape in self.shapes)
            raise DataError(f"expected inputs {wanted}, got {', '.join(str(list(one.shape)) for one in inputs)}")
        return torch.cat([one.flatten(1) for one in inputs], 1)

    def forward(self, packed: Tensor) -> Any:
        """What the model gives for the inputs in `packed`, `[B, N]`."""
        inputs, start = [], 0
        for shape in self.shapes:
            end = start + math.prod(shape)
            inputs.append(packed[:, start:end].reshape(-1, *shape))
            start = end
        return self.model(*inputs)
