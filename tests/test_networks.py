"""The papers' networks: sizes, operations and structure as the papers state them, and options in one string."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from quickspike.errors import OptionError, UnknownNameError
from quickspike.graph import trace
from quickspike.models import REGISTERED, ModelError, load_model
from quickspike.networks import NETWORKS, Add, Chain, build, digits_cnn

LAYERS = (nn.Conv2d, nn.Linear)


@pytest.fixture(autouse=True)
def own_randomness() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return build(name, **options).eval()


def small(name: str, **options: Any) -> nn.Module:
    """The same structure at an eighth of the width or less: cheap enough for all of them to run."""
    return build(name, width=2 if NETWORKS[name].image > 32 else NETWORKS[name].options.width // 8, **options)


def example(name: str, batch: int = 2, channels: int | None = None, device: str = "cpu") -> Tensor:
    row = NETWORKS[name]
    return torch.randn(batch, channels or row.options.channels, row.image, row.image, device=device)


def having(model: nn.Module, *kinds: type[nn.Module]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kinds)]


def names_of(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def operations(model: nn.Module, x: Tensor) -> list[int]:
    """Multiply-accumulates of one image in every convolution and linear layer, in the order of their calls."""
    counts: list[int] = []

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            counts.append(layer.weight.numel() * output.shape[2] * output.shape[3])
        elif isinstance(layer, nn.Linear):
            counts.append(layer.weight.numel())

    handles = [layer.register_forward_hook(count) for layer in having(model, *LAYERS)]
    model(x)
    for handle in handles:
        handle.remove()
    return counts


def calls(model: nn.Module, kind: type[nn.Module], x: Tensor) -> list[torch.Size]:
    """Shapes that come out of the layers of one kind, in the order of their calls."""
    shapes: list[torch.Size] = []
    handles = [layer.register_forward_hook(lambda _, __, output: shapes.append(output.shape)) for layer in having(model, kind)]
    model(x)
    for handle in handles:
        handle.remove()
    return shapes


# Sizes


def plain(channels: list[int], linear: list[int], bias: bool = False, norm: bool = False, kernels: list[int] | None = None) -> int:
    """Parameters of convolutions (3 x 3 unless `kernels` says otherwise) and linear layers in a row."""
    steps = zip(kernels or [3] * (len(channels) - 1), channels, channels[1:], strict=False)
    weights = sum(kernel**2 * inputs * outputs for kernel, inputs, outputs in steps)
    weights += sum(inputs * outputs for inputs, outputs in pairwise(linear))
    return weights + bias * (sum(channels[1:]) + sum(linear[1:])) + norm * 2 * sum(channels[1:])


def pre_activation(*blocks: int) -> int:
    """Stem without bias or norm; a norm in front of every convolution and of the head; biases; 1 x 1 projections."""
    channels = [64, *(size for size, count in zip((64, 128, 256, 512), blocks, strict=True) for _ in range(2 * count))]
    norms = 2 * sum(channels)
    projections = sum(2 * size * size + 2 * size for size in (64, 128, 256))
    return 27 * 64 + plain(channels, [512, 10], bias=True) + norms + projections


PROJECTIONS = 64 * 128 + 128 * 256 + 256 * 512
VGG16 = [3, 64, 64, 128, 128, *[256] * 3, *[512] * 6]
VGG19 = [3, 64, 64, 128, 128, *[256] * 4, *[512] * 8]
PARAMETERS = {
    "digits_cnn": 45_290,
    "fast_cnn": 2_242_602,
    "fast_resnet": 1_935_914,
    "vgg6": plain([3, 64, 128, 128], [8192, 4096, 4096, 10]),
    "vgg9": plain([3, 64, 128, 256, 256, 512, 512, 512], [2048, 4096, 4096, 10]),
    "vgg11": plain([3, 64, 128, 256, *[512] * 5], [2048, 4096, 4096, 10]),
    "vgg16_wide_head": plain(VGG16, [2048, 4096, 4096, 10]),
    "vgg16_imagenet": 138_357_544 - 13_416,  # torchvision's vgg16 without its biases
    "vgg16": plain(VGG16, [512, 4096, 4096, 10], bias=True, norm=True),
    "vgg19": plain(VGG19, [512, 10], bias=True, norm=True),
    "vgg_star": plain([3, 128, 128, 256, 256, 512, 512, 1024], [1024, 10], bias=True, norm=True),
    "mnist_cnn": plain([1, 32, 32, 32, 64, 64, 64, 128], [512, 10], bias=True, norm=True, kernels=[3, 3, 4, 3, 3, 4, 3]),
    "mnist_rate_norm": plain([1, 32, 32, 32], [32, 10], bias=True, norm=True),
    "mnist_alexnet": plain([1, 32, 64, 128, 256, 256], [2304, 1024, 512, 10], bias=True, norm=True),
    # torchvision's with a 3 x 3 stem and 10 classes
    "resnet18": 11_689_512 - 64 * 3 * (49 - 9) - 990 * 513,
    "resnet34": 21_797_672 - 64 * 3 * (49 - 9) - 990 * 513,
    "resnet20": 272_474,
    "resnet12_wide": plain([3, *[64] * 5, *[128] * 2, *[256] * 2, *[512] * 2], [2048, 10]) + PROJECTIONS,
    "resnet20_wide": plain([3, *[64] * 7, *[128] * 4, *[256] * 4, *[512] * 4], [2048, 10]) + PROJECTIONS,
    "resnet34_wide": plain([3, *[64] * 9, *[128] * 8, *[256] * 10, *[512] * 6], [2048, 10]) + PROJECTIONS,
    "preact_resnet18": pre_activation(2, 2, 2, 2),
    "preact_resnet34": pre_activation(3, 4, 6, 3),
}


def test_every_network_is_registered_and_has_its_count_here() -> None:
    assert set(REGISTERED) >= set(NETWORKS) == set(PARAMETERS)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_and_output_shape(name: str) -> None:
    model = on_meta(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert model(example(name, device="meta")).shape == (2, NETWORKS[name].options.classes)


@pytest.mark.parametrize(
    ("text", "total", "first"),
    [
        ("vgg16_wide_head", 338_403_328, 0.00523),
        ("vgg16_wide_head classes=100", 338_771_968, 0.00522),
        ("vgg16", 332_111_872, 0.00533),
        ("vgg16 classes=100", 332_480_512, 0.00532),
        ("vgg16_imagenet", 15_470_264_320, 0.00560),
        ("vgg6", 108_765_184, 0.01627),
        ("resnet20_wide", 215_699_456, 0.00820),
        ("vgg_star", 626_403_328, 0.00565),
        ("vgg_star channels=18", 644_098_048, 0.03297),
    ],
)
def test_operations_as_the_specification_counts_them(text: str, total: int, first: float) -> None:
    name, *options = text.split()
    chosen = {key: int(value) for key, value in (option.split("=") for option in options)}
    counts = operations(on_meta(name, **chosen), example(name, channels=chosen.get("channels"), device="meta"))
    assert sum(counts) == total
    assert round(counts[0] / total, 5) == first


@pytest.mark.parametrize("name", NETWORKS)
def test_width_scales_every_hidden_size(name: str) -> None:
    whole, half = on_meta(name), on_meta(name, width=NETWORKS[name].options.width // 2)
    pairs = list(zip(having(whole, *LAYERS), having(half, *LAYERS), strict=True))
    assert all(one.weight.shape[0] == 2 * other.weight.shape[0] for one, other in pairs[:-1])
    assert pairs[-1][0].weight.shape[0] == pairs[-1][1].weight.shape[0] == NETWORKS[name].options.classes


# Structure


@pytest.mark.parametrize(
    ("name", "pool"), [*((name, "average") for name in NETWORKS), ("vgg11", "max"), ("vgg_star", "max"), ("resnet20_wide", "max")]
)
def test_every_network_traces_with_a_site_at_every_relu(name: str, pool: str) -> None:
    model = small(name, pool=pool)
    assert len(trace(model, example(name)).sites) == len(having(model, nn.ReLU))


@pytest.mark.parametrize(
    ("name", "sites"), [("vgg16", 15), ("vgg16_wide_head", 15), ("resnet20_wide", 19), ("preact_resnet18", 17), ("vgg_star", 11)]
)
def test_as_many_spiking_layers_as_the_papers_have(name: str, sites: int) -> None:
    assert len(having(on_meta(name), nn.ReLU)) == sites


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = small(name, pool="average", dropout=0.0)
    model(example(name)).square().sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.isfinite().all()]
    assert missing == []
    assert next(model.parameters()).grad.abs().sum() > 0


def test_the_maps_of_the_mnist_network() -> None:
    shapes = calls(on_meta("mnist_cnn"), nn.Conv2d, example("mnist_cnn", device="meta"))
    assert [shape[2] for shape in shapes] == [26, 24, 12, 10, 8, 4, 2]


def test_the_digits_network_keeps_the_names_and_weights_of_its_files() -> None:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    torch.manual_seed(1)
    first, second, third = block(1, 32), block(32, 32), block(32, 64)
    head = [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)]
    expected = nn.Sequential(*first, *second, nn.AvgPool2d(2), *third, *head)
    torch.manual_seed(1)
    model = digits_cnn()
    assert str(model) == str(expected)
    assert list(model.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())


def blocks_of(model: nn.Module) -> list[Add]:
    return having(model, Add)


def test_a_block_of_fast_cnn_adds_two_convolutions_to_its_input() -> None:
    block, x = blocks_of(small("fast_cnn"))[0].eval(), torch.randn(2, 8, 4, 4)
    y = x
    for number in (1, 2):
        y = F.relu(block.body.get_submodule(f"norm{number}")(block.body.get_submodule(f"conv{number}")(y)))
    torch.testing.assert_close(block(x), x + y)


def test_a_block_of_fast_resnet_adds_two_convolutions_of_rectified_values_to_what_no_relu_has_seen() -> None:
    halving, same = (block.eval() for block in blocks_of(small("fast_resnet"))[1:3])
    for block, x in ((halving, torch.randn(2, 8, 4, 4)), (same, torch.randn(2, 16, 4, 4))):
        y, body = x, block.body
        for number in (1, 2):
            y = body.get_submodule(f"norm{number}")(body.get_submodule(f"conv{number}")(F.relu(y)))
        torch.testing.assert_close(block(x), (block.shortcut(x) if block is halving else x) + y)
    assert not having(halving.shortcut, nn.ReLU)


@pytest.mark.parametrize("index", [0, 2])
def test_a_post_activation_block_is_torchvisions(index: int) -> None:
    block = blocks_of(small("resnet18"))[index]
    inputs, outputs = block.body.conv1.in_channels, block.body.conv1.out_channels
    downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs)) if index else None
    reference = BasicBlock(inputs, outputs, 2 if index else 1, downsample)
    values = dict(zip(reference.state_dict(), block.state_dict().values(), strict=True))
    reference.load_state_dict(values)
    x = torch.randn(2, inputs, 8, 8)
    torch.testing.assert_close(block(x), reference(x))


@pytest.mark.parametrize("index", [0, 2])
def test_a_pre_activation_block_takes_the_shortcut_after_norm_and_relu(index: int) -> None:
    block = blocks_of(small("preact_resnet18", dropout=0.0))[index]
    x = torch.randn(2, block.body.conv1.in_channels, 8, 8)
    active = F.relu(block.before.norm(x))
    shortcut = block.shortcut(active) if index else active
    torch.testing.assert_close(block(x), shortcut + block.body.conv2(F.relu(block.body.norm1(block.body.conv1(active)))))
    assert isinstance(block.shortcut, nn.Conv2d if index else nn.Identity)


def test_a_wide_stem_has_three_convolutions_and_a_pooling() -> None:
    stem = on_meta("resnet20_wide").get_submodule("stem")
    expected = ["conv1", "relu1", "dropout1", "conv2", "relu2", "dropout2", "conv3", "relu3", "pool"]
    assert [name for name, _ in stem.named_children()] == expected


# Options


@pytest.mark.parametrize("name", NETWORKS)
def test_batch_norm_bias_and_pooling_are_as_asked_for(name: str) -> None:
    without = on_meta(name, batch_norm=False, bias=False, **({"pool": "max"} if NETWORKS[name].plan.pools else {}))
    assert not having(without, nn.BatchNorm2d, nn.AvgPool2d)
    assert all(layer.bias is None for layer in having(without, *LAYERS))
    assert without(example(name, device="meta")).shape == (2, NETWORKS[name].options.classes)
    with_all = on_meta(name, batch_norm=True, bias=True, pool="average")
    assert not having(with_all, nn.MaxPool2d)
    assert all(layer.bias is not None for layer in having(with_all, *LAYERS))
    norms, convolutions = len(having(with_all, nn.BatchNorm2d)), having(with_all, nn.Conv2d)
    # Before activation there is one for every 3 x 3 convolution: not for the stem's first, but one more in the head.
    assert norms == len([layer for layer in convolutions if layer.kernel_size != (1, 1) or not name.startswith("preact")])
    assert len(having(with_all, nn.AvgPool2d)) == len(having(without, nn.MaxPool2d))


@pytest.mark.parametrize("name", ["fast_cnn", "mnist_cnn", "resnet18", "preact_resnet18"])
def test_a_pooling_that_is_not_there_has_no_kind(name: str) -> None:
    assert not NETWORKS[name].plan.pools
    with pytest.raises(OptionError, match=f"{name} has no 2 x 2 pooling whose kind could be 'max'"):
        build(name, pool="max")


@pytest.mark.parametrize("name", NETWORKS)
def test_classes_and_channels_are_as_asked_for(name: str) -> None:
    model = on_meta(name, classes=7, channels=18)
    assert model(example(name, channels=18, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_is_a_module_only_where_there_is_some(name: str) -> None:
    none = on_meta(name, dropout=0.0, head_dropout=0.0)
    assert not having(none, nn.Dropout, nn.Dropout2d)
    some = on_meta(name, dropout=0.25, head_dropout=0.75)
    assert {layer.p for layer in having(some, nn.Dropout, nn.Dropout2d)} == {0.25, 0.75}
    if not getattr(NETWORKS[name].plan, "numbered", False):
        assert list(none.state_dict()) == list(some.state_dict()), "weights fit with and without dropout"


def test_biases_where_the_papers_have_them() -> None:
    def biased(name: str) -> list[str]:
        return [key.removesuffix(".bias") for key, _ in on_meta(name, batch_norm=False).named_parameters() if key.endswith(".bias")]

    for name in ("vgg6", "vgg11", "vgg16_wide_head", "resnet20_wide", "vgg16_imagenet"):
        assert biased(name) == [], name
    for name in ("resnet18", "resnet20", "fast_cnn"):
        assert biased(name) == ["classifier"], name
    for name in ("vgg16", "vgg_star", "mnist_cnn"):
        assert biased(name) == names_of(on_meta(name), *LAYERS), name
    assert sorted(["stem.conv1", *biased("preact_resnet18")]) == sorted(names_of(on_meta("preact_resnet18"), *LAYERS))


def test_average_pooling_replaces_the_dropout_before_it() -> None:
    average = [name for name, _ in on_meta("vgg16_wide_head", pool="average").named_children() if name[:4] in ("drop", "pool")]
    assert " ".join(average) == (
        "dropout1 pool1 dropout3 pool2 dropout5 dropout6 pool3 dropout8 dropout9 pool4 dropout11 dropout12 dropout13"
    )
    largest = [name for name, _ in on_meta("vgg16_wide_head").named_children() if name[:4] in ("drop", "pool")]
    assert largest[:4] == ["dropout1", "dropout2", "pool1", "dropout3"]
    assert len([name for name in largest if name.startswith("dropout")]) == 13
    assert len(having(on_meta("vgg16", dropout=0.1), nn.Dropout)) == 13, "elsewhere it stays in front of the pooling"


def test_dropout_inside_blocks_follows_the_first_activation() -> None:
    for name in ("resnet18", "resnet20_wide", "preact_resnet18"):
        for block in blocks_of(on_meta(name, dropout=0.1)):
            children = [child for child, _ in block.body.named_children()]
            assert children[children.index("dropout1") - 1] == "relu1"
            assert children[children.index("dropout1") + 1] == "conv2"
            assert len(having(block, nn.Dropout)) == 1


def test_rate_encoded_networks_drop_channels_and_spike_after_pooling() -> None:
    model = on_meta("vgg_star")
    assert {layer.p for layer in having(model, nn.Dropout2d)} == {0.1}
    assert not having(model, nn.Dropout)
    children = [name for name, _ in model.named_children()]
    assert all(children[children.index(f"pool{number}") + 1] == f"pool{number}_relu" for number in (1, 2, 3, 4))


# Weights at the start


def spread(layer: Any) -> float:
    return float(layer.weight.detach().std())


def test_weights_start_as_the_papers_say() -> None:
    for model in (build("vgg6", width=16, bias=True), build("resnet20_wide", width=16, bias=True)):
        for layer in having(model, nn.Conv2d):
            expected = (2 / (layer.kernel_size[0] ** 2 * layer.out_channels)) ** 0.5
            assert spread(layer) == pytest.approx(expected, rel=0.15)
        assert all(spread(layer) == pytest.approx(0.01, rel=0.1) for layer in having(model, nn.Linear))
        assert all(not layer.bias.any() for layer in having(model, *LAYERS))
    for name, fan in (("vgg16", 0), ("vgg_star", 1)):
        model = build(name, width=16)
        for layer in having(model, *LAYERS):
            expected = (2 / (layer.weight.shape[fan] * layer.weight[0, 0].numel())) ** 0.5
            assert spread(layer) == pytest.approx(expected, rel=0.15)
            assert not layer.bias.any()


def test_a_network_of_our_own_starts_as_torch_does() -> None:
    torch.manual_seed(3)
    expected = nn.Conv2d(3, 32, 3, padding=1, bias=False).weight
    torch.manual_seed(3)
    assert torch.equal(next(build("fast_cnn").parameters()), expected)


# Names with options


def test_a_name_with_options() -> None:
    model = load_model("mnist_alexnet,classes=100,width=8,pool=max,batch_norm=false,bias=True,dropout=0.5")
    assert having(model, nn.Linear)[-1].weight.shape == (100, 128)
    assert having(model, nn.MaxPool2d)
    assert not having(model, nn.BatchNorm2d)
    assert all(layer.bias is not None for layer in having(model, *LAYERS))
    assert {layer.p for layer in having(model, nn.Dropout)} == {0.5}
    assert not model.training
    assert len(having(load_model("mnist_alexnet, classes = 5 ,width=8"), nn.MaxPool2d)) == 0
    assert having(load_model("digits_cnn,classes=3"), nn.Linear)[-1].out_features == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fast-cnn,classes=5", "unknown model 'fast-cnn'; did you mean 'fast_cnn'"),
        ("fast_cnn,clases=5", "unknown option of fast_cnn 'clases'; did you mean 'classes'"),
        ("fast_cnn,batch-norm=true", "did you mean 'batch_norm'"),
        ("fast_cnn,name=x", "unknown option of fast_cnn 'name'"),
        ("fast_cnn,=5", "unknown option of fast_cnn ''"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_model(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("classes=ten", "fast_cnn: classes must be a whole number, got 'ten'"),
        ("classes=2.5", "fast_cnn: classes must be a whole number, got '2.5'"),
        ("classes=", "fast_cnn: classes must be a whole number, got ''"),
        ("classes=0", "fast_cnn: classes must be in range [1, 1048576], got 0"),
        ("width=-1", "fast_cnn: width must be in range [1, 8192], got -1"),
        ("pool=mean", "fast_cnn: pool must be one of 'max', 'average', got 'mean'"),
        ("batch_norm=1", "fast_cnn: batch_norm must be True or False, got '1'"),
        ("bias=maybe", "fast_cnn: bias must be one of None, True, False, got 'maybe'"),
        ("dropout=lots", "fast_cnn: dropout must be a finite number, got 'lots'"),
        ("dropout=nan", "fast_cnn: dropout must be a finite number, got nan"),
        ("dropout=1.5", "fast_cnn: dropout must be in range [0, 1], got 1.5"),
        ("classes", "fast_cnn: 'classes' is not an option; write options as fast_cnn,key=value,key=value"),
        ("", "fast_cnn: '' is not an option"),
        ("classes=5,classes=6", "fast_cnn: classes is given twice"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(options: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(f"fast_cnn,{options}")
    assert message in str(caught.value)


def test_bad_arguments_of_build_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'vgg16'"):
        build("vgg-16")
    with pytest.raises(UnknownNameError, match="did you mean 'classes'"):
        build("vgg16", klasses=3)
    with pytest.raises(OptionError, match="vgg16: classes must be a whole number"):
        build("vgg16", classes=True)
    with pytest.raises(UnknownNameError, match="torchvision model 'resnet18,classes=5'"):
        load_model("torchvision:resnet18,classes=5")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_row_names_its_source(name: str) -> None:
    row = NETWORKS[name]
    assert "arXiv" in row.source or row.source.startswith("quickspike")
    assert isinstance(row.plan, Chain) == (not name.endswith("_wide") and "resnet" not in name)
