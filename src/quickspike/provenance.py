"""How a result was made: versions and machine, as plain data."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from quickspike.version import __version__


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "quickspike": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in ("torchvision", "numpy", "safetensors")},
    }


def machine() -> dict[str, Any]:
    """What a figure that depends on the machine needs with it; nothing that names the machine or its user."""
    return {"processor": platform.machine(), "threads": torch.get_num_threads(), "system": platform.system()}
