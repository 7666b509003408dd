"""What this machine's processor can compute with, where that decides what is worth choosing."""

from __future__ import annotations

import logging
import math

import torch

logger = logging.getLogger(__name__)


def has_bfloat16() -> bool:
    """True if the processor multiplies in bfloat16; where it does not, layers take many times as long in it as in float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def largest_pair() -> float:
    """Largest sum of two products of bytes that is exact: without VNNI such sums have 16 bits, and saturate in silence."""
    return math.inf if torch.cpu._is_vnni_supported() else 2**15 - 1


def warn_of_slow(precision: str, device: str) -> None:
    """Say so if a precision, such as bf16 or bf16-mixed, is one that `device` has no arithmetic for."""
    if precision.startswith("bf16") and device == "cpu" and not has_bfloat16():
        logger.warning("%s: this processor has no bfloat16 arithmetic, so that this is much slower than float32", precision)


__all__ = ["has_bfloat16", "largest_pair", "warn_of_slow"]
