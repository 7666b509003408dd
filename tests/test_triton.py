"""The kernels for GPUs: run by Triton's interpreter on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("place", ["interpreter", "gpu"])
def test_the_kernels(place: str) -> None:
    if place == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU here; the interpreter runs the same kernels")
    cases = Path(__file__).with_name("triton_cases.py")
    environment = os.environ | {"TRITON_INTERPRET": "1" if place == "interpreter" else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert found.returncode == 0, found.stdout[-4000:]
    assert " passed" in found.stdout
    assert "skipped" not in found.stdout
