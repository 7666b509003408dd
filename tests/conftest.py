"""Networks, data and conversions that several test files share. Everything random comes from a seeded generator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import quickspike as qs
from cli_results import Result
from quickspike.cli import main
from quickspike.data import DataSet, load_data
from quickspike.demo import train_digits
from quickspike.graph import Site
from quickspike.method import Method, Paper
from quickspike.neuron import NeuronParameters


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are too small to share out, and on a busy machine threads that wait for each other cost a factor of ten."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Chain(nn.Module):
    """Convolutions in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(x))
        x = self.relu2(self.conv2(x))
        x = self.relu3(self.conv3(x))
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """One join of two timed operands, one of a timed and a constant operand, one module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.conv2, self.conv3 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv1(self.relu(x))
        x = self.relu(x)
        x = torch.relu(x + self.conv3(torch.relu(self.conv2(x))))
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    """Concatenation of timed with constant and of timed with timed signals."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(8 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.conv1(x))
        second = torch.relu(self.conv2(torch.cat([x, first], 1)))
        return self.head(torch.cat([first, second], 1).flatten(1))


class Pooled(nn.Module):
    """Max-pooling before time starts, in front of a timed neuron, and of a sum of spikes; average pooling too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.conv3 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.conv1(nn.functional.interpolate(x, scale_factor=2.0))), 2)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = nn.functional.max_pool2d(x + torch.relu(self.conv3(x)), 3, 1, 1)
        return self.head(nn.functional.avg_pool2d(x, 4).flatten(1))


class Perceptron(nn.Sequential):
    """Fully connected."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 5))


NETWORKS: dict[str, type[nn.Module]] = {cls.__name__.lower(): cls for cls in (Chain, Residual, Concat, Pooled, Perceptron)}


@pytest.fixture(scope="session")
def random_network() -> Callable[..., nn.Module]:
    """random_network(name, seed): float64 weights, scaled so that signals keep their size from layer to layer."""

    def make(name: str, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        network = NETWORKS[name]().double().eval()
        with torch.no_grad():
            for parameter in network.parameters():
                spread = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread)
        return network

    return make


@pytest.fixture(scope="session")
def random_images() -> Callable[..., Tensor]:
    """random_images(name, number, seed): standard normal float64 images for that network."""

    def make(name: str, number: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (6,) if name == "perceptron" else (2, 8, 8)
        return torch.randn(number, *shape, generator=generator, dtype=torch.float64)

    return make


@pytest.fixture(scope="session")
def dyadic_network() -> Callable[..., nn.Module]:
    """dyadic_network(name, seed): weights that are small multiples of 1/8, so that no sum of them is ever rounded."""

    def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        network = NETWORKS[name]().to(dtype).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randint(-3, 5, parameter.shape, generator=generator) / 8)
        return network

    return make


@pytest.fixture(scope="session")
def dyadic_images() -> Callable[..., Tensor]:
    """dyadic_images(name, number, seed): multiples of 1/4 in [-1, 1]."""

    def make(name: str, number: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (6,) if name == "perceptron" else (2, 8, 8)
        return (torch.randint(-4, 5, (number, *shape), generator=generator) / 4).to(dtype)

    return make


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(Method):
    """Neuron parameters as a test gives them. Not registered."""

    name: ClassVar[str] = "given"
    paper: ClassVar[Paper] = Paper("nobody", "none", 2000, "0000.00000")
    parameters: Callable[[Site], NeuronParameters]

    def activation(self, site: Site) -> nn.Module:
        return nn.ReLU()

    def neuron(self, site: Site, activation: nn.Module) -> NeuronParameters:
        return self.parameters(site)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "options": {"steps": self.steps}}


@pytest.fixture(scope="session")
def convert_given() -> Callable[..., qs.SpikingNetwork]:
    """convert_given(model, images, parameters(site), steps): a conversion without calibration."""

    def make(model: nn.Module, images: Tensor, parameters: Callable[[Site], NeuronParameters], steps: int) -> qs.SpikingNetwork:
        return qs.convert(model, images, Given(steps=steps, parameters=parameters))

    return make


@pytest.fixture(scope="session")
def dyadic_parameters() -> Callable[..., Callable[[Site], NeuronParameters]]:
    """dyadic_parameters(leak): thresholds per channel that are multiples of 1/8, v(0) = theta/2, for `convert_given`."""

    def make(leak: float = 1.0, dtype: torch.dtype = torch.float64, **more: Any) -> Callable[[Site], NeuronParameters]:
        def parameters(site: Site) -> NeuronParameters:
            generator = torch.Generator().manual_seed(sum(map(ord, site.name)))
            theta = site.per_channel(torch.randint(4, 12, (site.channels,), generator=generator) / 8).to(dtype)
            return NeuronParameters(theta, **{"initial": 0.5, "leak": leak, **more})

        return parameters

    return make


@pytest.fixture(scope="session")
def digits() -> DataSet:
    return load_data("digits")


@pytest.fixture(scope="session")
def digits_source(digits: DataSet) -> nn.Module:
    """A network that gets more than 98 % of the test digits right."""
    return train_digits(digits, epochs=3)


def _stack(digits: DataSet, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    batches = list(digits.loader(split, limit=limit))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


@pytest.fixture(scope="session")
def digits_calibration(digits: DataSet) -> Tensor:
    return _stack(digits, "train", 300)[0]


@pytest.fixture(scope="session")
def digits_test(digits: DataSet) -> tuple[Tensor, Tensor]:
    return _stack(digits, "test")


@pytest.fixture(scope="session")
def spiking_digits(digits_source: nn.Module, digits_calibration: Tensor) -> Callable[[str], qs.SpikingNetwork]:
    """spiking_digits(method): the digits network converted for T = 16, once per session. Copy it before changing it."""
    made: dict[str, qs.SpikingNetwork] = {}

    def get(method: str) -> qs.SpikingNetwork:
        if method not in made:
            made[method] = qs.convert(digits_source, digits_calibration, method, steps=16)
        return made[method]

    return get


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run("evaluate", file, ...)` calls the command line and gives a `Result`."""
    # Help and tables fold at the width of the terminal; a wide one keeps every phrase in one line.
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "dumb")

    def call(*arguments: Any) -> Result:
        code: Any = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = leaving.code
        captured = capsys.readouterr()
        return Result(0 if code is None else code, captured.out, captured.err)

    return call
