"""How a result was made: versions and machine, as plain data."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quickspike.version import __version__


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "quickspike": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in ("torchvision", "numpy", "safetensors")},
    }


def commit() -> str | None:
    """Commit of the repository that this package runs from, "+" behind it if files were changed; None if it is none."""
    folder = Path(__file__).parent
    try:
        git = ["git", "-C", str(folder)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")


def digest(tensors: Iterable[Tensor]) -> str:
    """What tells these tensors from others: of all their bytes, in order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """What a figure that depends on the machine needs with it; nothing that names the machine or its user."""
    return {
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
