"""Networks by name: registered ones, torchvision's, timm's, and a factory in a user's own file."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from quickspike.errors import QuickspikeError, UnknownNameError


class ModelError(QuickspikeError):
    """A model or its weights cannot be loaded."""


def digits_cnn() -> nn.Sequential:
    """Three convolutions with batch norm for the embedded 8 x 8 digits: `[B, 1, 8, 8]` to `[B, 10]`."""

    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        return [nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 32),
        nn.AvgPool2d(2),
        *block(32, 64),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


REGISTERED: dict[str, Callable[[], nn.Module]] = {"digits_cnn": digits_cnn}


def load_model(name: str, weights: str | Path | None = None) -> nn.Module:
    """A network by its name on the command line, in evaluation mode.

    Args:
        name: a registered name, `torchvision:NAME`, `timm:NAME`, or `FILE.py:FACTORY` (a function without arguments).
        weights: safetensors, or a .pt/.pth/.th file that `torch.load` reads with weights_only. Without it the
            weights are what the factory gives (for torchvision and timm random, seed 0).

    Raises:
        UnknownNameError: no such model; the message offers the nearest name.
        ModelError: the file, the factory or the weights are unusable.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _build(name)
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def _build(name: str) -> nn.Module:
    kind, colon, rest = name.partition(":")
    if kind == "torchvision" and colon:
        return _torchvision(rest)
    if kind == "timm" and colon:
        return _timm(rest)
    file, colon, factory = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_file(Path(file), factory)
    if name in REGISTERED:
        return REGISTERED[name]()
    raise UnknownNameError("model", name, (*REGISTERED, "torchvision:NAME", "timm:NAME", "FILE.py:FACTORY"))


def _torchvision(name: str) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise UnknownNameError("torchvision model", name, models.list_models())
    # Inception and GoogLeNet warn about their initialisation and add training heads unless told otherwise.
    extra: dict[str, Any] = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    # Detection and segmentation networks would otherwise download weights for their backbone.
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        extra["weights_backbone"] = None
    model: nn.Module = models.get_model(name, weights=None, **extra)
    return model


def _timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ModelError("timm is not installed; install it with: pip install 'quickspike[timm]'") from None
    if not timm.is_model(name):
        raise UnknownNameError("timm model", name, timm.list_models())
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _from_file(file: Path, factory: str) -> nn.Module:
    spec = importlib.util.spec_from_file_location(f"quickspike model file {file.stem}", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ModelError(f"{file}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        with _known(module, file):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ModelError(f"{file} fails to run: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, factory, None)):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UnknownNameError(f"factory in {file}:", factory, known)
    try:
        with _known(module, file):
            model = getattr(module, factory)()
    except (Exception, SystemExit) as error:
        raise ModelError(f"{file}:{factory}() fails: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{file}:{factory}() must return a torch.nn.Module, it returned a {type(model).__name__}")
    return model


@contextlib.contextmanager
def _known(module: ModuleType, file: Path) -> Iterator[None]:
    """As if the file were run: it can import its neighbours, and dataclasses find their module by name."""
    folder = str(file.resolve().parent)
    sys.modules[module.__name__] = module
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        del sys.modules[module.__name__]


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights into `model`, in place. No code of the file is ever run.

    A state dict may sit under `state_dict` or `model`; the prefix `module.` of a parallel wrapper is dropped.

    Raises:
        ModelError: the file is missing or unusable, holds code, or its tensors do not fit.
    """
    state = _read_state(Path(path))
    nested = (state[key] for key in ("state_dict", "model") if isinstance(state.get(key), Mapping))
    state = {str(key).removeprefix("module."): value for key, value in next(nested, state).items()}
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path}: holds more than tensors; save model.state_dict()")
    try:
        # load_state_dict copies what fits before it complains about the rest.
        copy.deepcopy(model).load_state_dict(state)
        model.load_state_dict(state)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
        raise ModelError(f"{path}: does not fit {type(model).__name__}: {' '.join(problems)[:300]}") from error


def _read_state(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol; whether the file can be read is all that counts
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message recommends to switch the protection off.
        raise ModelError(f"{path}: not a file of weights that can be read without running code; save model.state_dict()") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"{path}: not a file of weights that can be read without running code ({reason})") from error
    if not isinstance(state, Mapping):
        raise ModelError(f"{path}: holds a {type(state).__name__}; save model.state_dict()")
    return dict(state)
