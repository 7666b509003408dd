"""Networks by name, factories in files, and weights that are read without running code."""

from __future__ import annotations

import builtins
import contextlib
import pickle
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from quickspike.errors import QuickspikeError, UnknownNameError
from quickspike.models import REGISTERED, ModelError, digits_cnn, load_model, load_weights

SOURCE = """
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).train()


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(x)


made = lambda: Net(5)
number = 3


def needs_an_argument(width):
    return Net(width)


def raises():
    raise KeyError("inside")


def gives_text():
    return "net"


def gives_a_class():
    return Net


def leaves():
    raise SystemExit(0)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my net.py"
    path.write_text(SOURCE)
    return path


def same_state(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)


# Names


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_names(name: str) -> None:
    model = load_model(name)
    assert isinstance(model, nn.Module)
    assert not model.training
    assert same_state(model, load_model(name))


def test_digits_cnn_has_the_documented_shape() -> None:
    with torch.no_grad():
        assert load_model("digits_cnn")(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_torchvision_names(name: str) -> None:
    from torchvision import models

    model = load_model(f"torchvision:{name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert same_state(model, models.get_model(name, weights=None))
    assert not model.training


def test_timm_names() -> None:
    pytest.importorskip("timm")
    model = load_model("timm:resnet10t")
    assert not model.training
    assert same_state(model, load_model("timm:resnet10t"))


def test_without_timm_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "timm":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModelError, match=r"pip install 'quickspike\[timm\]'"):
        load_model("timm:resnet10t")


def test_loading_by_name_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    load_model("digits_cnn")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large", "fasterrcnn_resnet50_fpn"]
)
def test_no_name_fetches_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Detection and segmentation networks have backbones with weights of their own, by default downloaded."""
    fetched: list[Any] = []

    def fetch(*args: Any, **kwargs: Any) -> Any:
        fetched.append(args)
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fetch)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with contextlib.suppress(QuickspikeError):
        load_model(f"torchvision:{name}")
    assert fetched == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("digits-cnn", "did you mean 'digits_cnn'"),
        ("digit_cnn", "did you mean 'digits_cnn'"),
        ("torchvision:resnet8", "did you mean 'resnet18'"),
        ("torchvision:ResNet18", "did you mean 'resnet18'"),
        ("torchvision:", "known: "),
        ("qqqq", "FILE.py:FACTORY"),
        ("", "digits_cnn"),
        ("swin_t", "torchvision:"),
        ("torch:resnet18", "torchvision:"),
        ("net.txt:net", "FILE.py:FACTORY"),
        ("net.py", "FILE.py:FACTORY"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_model(name)
    assert hint in str(caught.value)
    assert repr(name.removeprefix("torchvision:")) in str(caught.value)


def test_an_unknown_timm_name_suggests_the_nearest() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UnknownNameError, match="did you mean 'resnet18'"):
        load_model("timm:resnet-18")


# Factories in files


def test_a_factory_in_a_file(file: Path) -> None:
    model = load_model(f"{file}:net")
    assert isinstance(model, nn.Sequential)
    assert not any(module.training for module in model.modules())
    assert same_state(model, load_model(f"{file}:net")), "without weights, seed 0"
    assert isinstance(load_model(f"{file}:Net").head, nn.Linear)
    assert load_model(f"{file}:made").head.in_features == 5


def test_a_relative_path_and_a_colon_in_the_path(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "net.py").write_text(SOURCE)
    assert load_model(f"{tmp_path / 'a:b' / 'net.py'}:Net")
    monkeypatch.chdir(tmp_path)
    assert load_model("my net.py:Net")


def test_a_file_leaves_no_module_and_no_path_behind(file: Path) -> None:
    before, path = set(sys.modules), list(sys.path)
    load_model(f"{file}:net")
    assert sys.path == path
    assert not [name for name in set(sys.modules) - before if "net" in name and not name.startswith("torch")]


def test_a_file_that_is_named_like_a_module_hides_none(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(SOURCE)
    load_model(f"{tmp_path / 'json.py'}:net")
    import json

    assert json.loads("1") == 1
    assert sys.modules["json"] is json


def test_a_file_may_define_dataclasses(tmp_path: Path) -> None:
    """With postponed annotations a dataclass looks its own module up in sys.modules while the file still runs."""
    (tmp_path / "config.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from torch import nn\n\n\n"
        "@dataclass\nclass Config:\n    width: int = 3\n    kind: ClassVar[str] = 'mlp'\n\n\n"
        "def net():\n    return nn.Linear(Config().width, 2)\n"
    )
    assert load_model(f"{tmp_path / 'config.py'}:net").in_features == 3


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nett", "did you mean 'net'"),
        ("", "unknown factory"),
        ("number", "unknown factory"),
        ("needs_an_argument", r"needs_an_argument\(\) fails: TypeError"),
        ("raises", r"raises\(\) fails: KeyError: 'inside'"),
        ("gives_text", "returned a str"),
        ("gives_a_class", "returned a type"),
        ("leaves", r"leaves\(\) fails: SystemExit"),
    ],
)
def test_a_bad_factory_is_refused(factory: str, message: str, file: Path) -> None:
    with pytest.raises(QuickspikeError, match=message) as caught:
        load_model(f"{file}:{factory}")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError.*no_such_module_anywhere"),
        ("def net(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("\0", "SyntaxError|ValueError"),
        ("", "unknown factory"),
    ],
)
def test_a_bad_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(QuickspikeError, match=message) as caught:
        load_model(f"{tmp_path / 'bad.py'}:net")
    assert str(tmp_path / "bad.py") in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    for name in ("missing.py", "folder.py", "a/b.py"):
        with pytest.raises(ModelError, match="no such Python file"):
            load_model(f"{tmp_path / name}:net")


def test_an_interrupt_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_model(f"{tmp_path / 'slow.py'}:net")


# Weights


def other_weights() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = digits_cnn()
        model(torch.randn(4, 1, 8, 8))
    return {key: value.clone() for key, value in model.state_dict().items()}


FORMS = {
    "plain": lambda state: state,
    "under state_dict": lambda state: {"state_dict": state, "epoch": 3, "best": 0.5},
    "under model": lambda state: {"model": state, "optimizer": {"lr": 1}},
    "parallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "parallel under state_dict": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "half": lambda state: {key: value.half() if value.is_floating_point() else value for key, value in state.items()},
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
@pytest.mark.parametrize("form", FORMS)
def test_weights_in_every_usual_form(form: str, suffix: str, tmp_path: Path) -> None:
    state = other_weights()
    torch.save(FORMS[form](state), tmp_path / f"w{suffix}")
    model = load_model("digits_cnn", tmp_path / f"w{suffix}")
    for key, value in model.state_dict().items():
        expected = state[key].half().float() if form == "half" and value.is_floating_point() else state[key]
        assert torch.equal(value, expected), key
    assert not model.training


def test_weights_as_safetensors_and_as_an_old_file(tmp_path: Path) -> None:
    state = other_weights()
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    safetensors.torch.save_file({f"module.{key}": value for key, value in state.items()}, tmp_path / "p.safetensors")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("w.safetensors", "p.safetensors", "old.pt"):
        assert all(torch.equal(value, state[key]) for key, value in load_model("digits_cnn", str(tmp_path / name)).state_dict().items())


def write(path: Path, content: Any) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


BAD: dict[str, tuple[str, Any, str]] = {
    "wrong shape": (".pt", lambda state: state | {"0.weight": torch.zeros(32, 3, 3, 3)}, r"does not fit Sequential.*0\.weight"),
    "wrong shape, safetensors": (".safetensors", lambda state: state | {"0.weight": torch.zeros(32, 3, 3, 3)}, r"0\.weight"),
    "missing": (".pt", lambda state: {key: value for key, value in state.items() if not key.startswith("0.")}, "Missing"),
    "unexpected": (".safetensors", lambda state: state | {"extra.weight": torch.zeros(1)}, "Unexpected.*extra"),
    "foreign": (".safetensors", lambda state: {"a": torch.zeros(1)}, "does not fit"),
    "nothing in it": (".pt", lambda state: {}, "does not fit"),
    "more than tensors": (".pt", lambda state: {**state, "epoch": 3}, "more than tensors"),
    "a tensor": (".pt", lambda state: torch.zeros(3), "holds a Tensor"),
    "a list": (".pt", lambda state: [torch.zeros(3)], "holds a list"),
    "a whole network": (".pt", lambda state: digits_cnn(), "without running code"),
    "empty": (".pt", lambda state: b"", "weights"),
    "empty safetensors": (".safetensors", lambda state: b"", "weights"),
    "text": (".pth", lambda state: b"hello", "weights"),
    "text as safetensors": (".safetensors", lambda state: b"hello there, this is text", "weights"),
    "torch file named safetensors": (".safetensors", None, "weights"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_are_refused_with_path_and_reason(case: str, tmp_path: Path) -> None:
    suffix, make, rule = BAD[case]
    if make is None:
        torch.save(other_weights(), tmp_path / "x.pt")
        path = write(tmp_path / f"w{suffix}", (tmp_path / "x.pt").read_bytes())
    else:
        path = write(tmp_path / f"w{suffix}", make(other_weights()))
    with pytest.raises(ModelError, match=rule) as caught:
        load_model("digits_cnn", path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(path))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_cut_weights_are_refused(suffix: str, tmp_path: Path) -> None:
    whole = write(tmp_path / f"whole{suffix}", other_weights()).read_bytes()
    for size in (1, 8, 100, len(whole) // 2, len(whole) - 1):
        path = write(tmp_path / f"cut{suffix}", whole[:size])
        with pytest.raises(ModelError):
            load_model("digits_cnn", path)


def test_a_file_that_says_it_is_long_is_not_given_memory(tmp_path: Path) -> None:
    """A pickle with a text of 2^31 bytes: an ordinary file that is read takes room for all of them first."""
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    (tmp_path / "w.pt").write_bytes(magic + b"\x80\x02X" + (2**31).to_bytes(4, "little") + b"x" * 50)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="weights"):
            load_model("digits_cnn", tmp_path / "w.pt")
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("options", ["width=1000000", "classes=100000000", "width=8192"])
def test_a_network_that_no_machine_holds_is_refused(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(**options: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    if options == "width=8192":
        monkeypatch.setitem(REGISTERED, "digits_cnn", too_large)
    with pytest.raises(ModelError, match=options.partition("=")[0]):
        load_model(f"digits_cnn,{options}")


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.pt", tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(ModelError, match="no such file"):
            load_model("digits_cnn", path)


def test_refused_weights_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = load_model("digits_cnn")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = write(tmp_path / "w.pt", other_weights() | {"0.weight": torch.zeros(1)})
    with pytest.raises(ModelError):
        load_weights(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_file_can_import_its_neighbours(tmp_path):
    (tmp_path / "quickspike_test_layers.py").write_text("from torch import nn\n\n\ndef layer():\n    return nn.Linear(2, 2)\n")
    (tmp_path / "net.py").write_text("from quickspike_test_layers import layer\n\n\ndef make():\n    return layer()\n")
    assert isinstance(load_model(f"{tmp_path}/net.py:make"), nn.Linear)
