"""Networks by name: registered ones, torchvision's, timm's, and a factory in a user's own file."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import math
import mmap
import pickle
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from quickspike.errors import OptionError, QuickspikeError, UnknownNameError
from quickspike.files import write_bytes
from quickspike.memory import out_of_memory
from quickspike.networks import BUILDERS, Options
from quickspike.networks import digits_cnn as digits_cnn
from quickspike.options import options_of
from quickspike.preprocessing import Preprocessing

PRETRAINED = "pretrained"
"""In the place of a file of weights: the library's own."""


class ModelError(QuickspikeError):
    """A model or its weights cannot be loaded."""


REGISTERED: dict[str, Callable[..., nn.Module]] = dict(BUILDERS)
"""Name -> builder, which takes the fields of `networks.Options` as keywords."""


def load_model(name: str, weights: str | Path | None = None, seed: int = 0) -> nn.Module:
    """A network by its name on the command line, in evaluation mode.

    Args:
        name: a registered name, with options if wanted (`vgg16,pool=max,classes=100`), `torchvision:NAME`, `timm:NAME`,
            or `FILE.py:FACTORY` (a function without arguments).
        weights: safetensors, or a .pt/.pth/.th file that `torch.load` reads with weights_only; "pretrained" takes those that
            torchvision or timm have, which they fetch once. Without it the weights are what the factory gives (random
            ones are drawn from `seed`).
        seed: of random weights.

    Raises:
        UnknownNameError: no such model or option; the message offers the nearest name.
        ModelError: the value of an option, the file, the factory or the weights are unusable.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _pretrained(name) if is_pretrained(weights) else _build(name)
    if weights is not None and not is_pretrained(weights):
        load_weights(model, weights)
    return model.eval()


def is_pretrained(weights: str | Path | None) -> bool:
    """Whether the library's own weights are asked for."""
    return str(weights) == PRETRAINED


def _pretrained(name: str) -> nn.Module:
    kind, _, rest = name.partition(":")
    preprocessing_of(name)
    try:
        if kind == "torchvision":
            from torchvision import models

            found: nn.Module = models.get_model(rest, weights="DEFAULT")
        else:
            import timm

            found = timm.create_model(rest, pretrained=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"the pretrained weights of {name} cannot be had: {reason}") from error
    return found


def preprocessing_of(name: str) -> Preprocessing:
    """What the pretrained weights of a torchvision or timm model were trained with.

    Raises:
        UnknownNameError: no such model.
        ModelError: there are no pretrained weights.
    """
    kind, colon, rest = name.partition(":")
    none = ModelError(f"{name} has no pretrained weights; those of torchvision:NAME and timm:NAME do, for others name a file")
    if kind == "torchvision" and colon:
        from torchvision import models

        if rest not in models.list_models():
            raise UnknownNameError("torchvision model", rest, models.list_models())
        choices = list(models.get_model_weights(rest))
        if not choices:
            raise none
        preset = models.get_weight(f"{type(choices[0]).__name__}.DEFAULT").transforms()
        resize, crop = (getattr(preset, side, None) or [0] for side in ("resize_size", "crop_size"))
        return Preprocessing(tuple(preset.mean), tuple(preset.std), resize[0], crop[0], preset.interpolation.value)
    if kind == "timm" and colon:
        timm = _timm_library()
        if not timm.is_model(rest):
            raise UnknownNameError("timm model", rest, timm.list_models())
        found = timm.get_pretrained_cfg(rest)
        if not timm.is_model_pretrained(rest) or found is None:
            raise none
        size = found.input_size[-1]
        return Preprocessing(tuple(found.mean), tuple(found.std), math.floor(size / found.crop_pct), size, found.interpolation)
    raise none


def _build(name: str) -> nn.Module:
    kind, colon, rest = name.partition(":")
    if kind == "torchvision" and colon:
        return _torchvision(rest)
    if kind == "timm" and colon:
        return _timm(rest)
    file, colon, factory = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_file(Path(file), factory)
    registered, *pairs = name.split(",")
    if registered in REGISTERED:
        return _registered(registered, pairs)
    forms = ("torchvision:NAME", "timm:NAME", "FILE.py:FACTORY")
    # No registered name has a colon: who writes one means one of the other forms.
    raise UnknownNameError("model", registered, forms if ":" in registered else (*REGISTERED, *forms))


def _registered(name: str, pairs: list[str]) -> nn.Module:
    """The registered network of that name with the options `key=value`."""
    known = {key: kind for key, (_, kind, _) in options_of(Options).items()}
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ModelError(f"{name}: {pair!r} is not an option; write options as {name},key=value,key=value")
        if key not in known:
            raise UnknownNameError(f"option of {name}", key, known)
        if key in options:
            raise ModelError(f"{name}: {key} is given twice")
        options[key] = _value(value, known[key])
    try:
        return REGISTERED[name](**options)
    except OptionError as error:
        raise ModelError(str(error)) from error
    except RuntimeError as error:
        raise ModelError(f"{name}: a network with {', '.join(pairs)} is too large ({str(error).splitlines()[0][:200]})") from error


def _value(text: str, kind: Any) -> Any:
    """What `text` stands for; if it stands for nothing, `text` itself, which the check of the options then refuses."""
    choices = (True, False) if kind is bool else typing.get_args(kind)
    if choices:
        return {str(choice).lower(): choice for choice in choices}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


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


def _timm_library() -> Any:
    try:
        import timm
    except ImportError:
        raise ModelError("timm is not installed; install it with: pip install 'quickspike[timm]'") from None
    return timm


def _timm(name: str) -> nn.Module:
    timm = _timm_library()
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
        state = read_plain(path)
    except pickle.UnpicklingError as error:
        # torch's own message recommends to switch the protection off.
        raise ModelError(f"{path}: not a file of weights that can be read without running code; save model.state_dict()") from error
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"{path}: not a file of weights that can be read without running code ({reason})") from error
    if not isinstance(state, Mapping):
        raise ModelError(f"{path}: holds a {type(state).__name__}; save model.state_dict()")
    return dict(state)


def read_plain(path: Path, device: str | torch.device = "cpu") -> Any:
    """Tensors and plain data that torch.save wrote; no code of the file is ever run. Errors are whatever torch raises."""
    with warnings.catch_warnings(), path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        warnings.simplefilter("ignore")  # about the pickle protocol; whether the file can be read is all that counts
        # Mapped, because an ordinary file that is asked for more than it has allocates that much first.
        # It reads and seeks like a file, but is none to the type checker.
        return torch.load(cast(IO[bytes], mapped), map_location=device, weights_only=True)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the state dict of `model` as safetensors, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(path, save(state))
