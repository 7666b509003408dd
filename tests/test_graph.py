import contextlib
import copy
import gc
import operator
import re

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import quickspike as qs
from quickspike import graph as graph_module
from quickspike.capture import capture
from quickspike.errors import DataError, QuickspikeError, TraceError, UnsupportedOperatorError
from quickspike.memory import out_of_memory
from quickspike.operators import FUNCTION_NAMES, MAX_POOLS, Affine
from quickspike.rewrite import fold_batch_norm

PLACE = r"test_graph\.py:\d+ in \S+"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def images(count=3, channels=3, size=8, seed=1):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def lively(net):
    """Batch norms as after training: folding a fresh one would prove nothing."""
    generator = torch.Generator().manual_seed(7)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5, generator=generator)
                nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
    return net


def output_of(net, x):
    with torch.no_grad():
        return copy.deepcopy(net).eval()(x.clone())


def operators_of(traced):
    calls = [node for node in traced.module.graph.nodes if node.op.startswith("call_")]
    return {node.target if node.op == "call_function" else node.op for node in calls}


def faithful(net, x=None):
    """Trace on one sample, compare on others; a graph of any other operator could not be saved."""
    x = images() if x is None else x
    traced = qs.trace(net, x[:1])
    assert operators_of(traced) <= {"call_module", *FUNCTION_NAMES}
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(99), dtype=x.dtype)
    with torch.no_grad():
        torch.testing.assert_close(traced.module(fresh), output_of(net, fresh), rtol=1e-4, atol=1e-4)
    return traced


def spiking(net, x=None, steps=3):
    """Convert; folding time into the batch must give what a run step by step gives."""
    x = images() if x is None else x
    snn = qs.convert(net, x, steps=steps)
    with torch.no_grad():
        folded, stepped = qs.simulate(snn, x), qs.simulate(snn, x, step_by_step=True)
    assert folded.logits.shape == (steps, *output_of(net, x).shape)
    torch.testing.assert_close(folded.logits, stepped.logits, rtol=1e-4, atol=1e-4)
    return snn


def converges(net, x, tolerance=0.02):
    """With many steps the spiking network says what the source says."""
    snn = qs.convert(net, x, steps=400, ceiling="percentile", percentile=100.0)
    expected = output_of(net, x)
    with torch.no_grad():
        error = (snn(x) - expected).abs().max() / expected.abs().max()
    assert error < tolerance
    return snn


class Between(nn.Module):
    """conv -> the operation under test -> classifier."""

    def __init__(self, operation, channels=4, head=True):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.operation = operation
        self.fc = nn.LazyLinear(5) if head else nn.Identity()
        self.head = head

    def forward(self, x):
        x = self.operation(self.conv(x))
        return self.fc(torch.flatten(x, 1)) if self.head else x


def between(operation, **options):
    net = Between(operation, **options).eval()
    with torch.no_grad():
        net(images(1))
    return net.train()


def discarded(method, *args):
    def operation(x):
        getattr(x, method)(*args)
        return x

    return operation


SITE_FORMS = {
    "nn.ReLU": (nn.ReLU(), None),
    "nn.ReLU(inplace)": (nn.ReLU(inplace=True), None),
    "F.relu": (lambda x: F.relu(x), None),
    "F.relu(inplace=True)": (lambda x: F.relu(x, inplace=True), None),
    "F.relu(x, True)": (lambda x: F.relu(x, True), None),
    "F.relu(input=x)": (lambda x: F.relu(input=x), None),
    "F.relu_": (lambda x: F.relu_(x), None),
    "torch.relu": (lambda x: torch.relu(x), None),
    "torch.relu_": (lambda x: torch.relu_(x), None),
    "x.relu()": (lambda x: x.relu(), None),
    "x.relu_() result used": (lambda x: x.relu_(), None),
    "x.relu_() result discarded": (discarded("relu_"), None),
    "nn.ReLU6": (nn.ReLU6(), 6.0),
    "nn.ReLU6(inplace)": (nn.ReLU6(inplace=True), 6.0),
    "F.relu6": (lambda x: F.relu6(x), 6.0),
    "F.relu6(inplace=True)": (lambda x: F.relu6(x, inplace=True), 6.0),
    "x.clamp(0, c)": (lambda x: x.clamp(0, 0.5), 0.5),
    "x.clamp(min, max)": (lambda x: x.clamp(min=0, max=0.5), 0.5),
    "x.clamp(max, min)": (lambda x: x.clamp(max=0.5, min=0.0), 0.5),
    "x.clamp(0, max=c)": (lambda x: x.clamp(0.0, max=0.5), 0.5),
    "x.clamp(min=0)": (lambda x: x.clamp(min=0), None),
    "x.clamp(0)": (lambda x: x.clamp(0), None),
    "x.clamp(0, None)": (lambda x: x.clamp(0, None), None),
    "x.clamp_(0, 6) discarded": (discarded("clamp_", 0, 0.5), 0.5),
    "x.clamp_min(0)": (lambda x: x.clamp_min(0), None),
    "x.clamp_min_(0) discarded": (discarded("clamp_min_", 0), None),
    "x.clip(0, c)": (lambda x: x.clip(0, 0.5), 0.5),
    "torch.clamp": (lambda x: torch.clamp(x, 0, 0.5), 0.5),
    "torch.clamp(min, max)": (lambda x: torch.clamp(x, min=0.0, max=0.5), 0.5),
    "torch.clamp(input=)": (lambda x: torch.clamp(input=x, min=0.0, max=0.5), 0.5),
    "torch.clamp(min=0)": (lambda x: torch.clamp(x, min=0), None),
    "torch.clamp_min": (lambda x: torch.clamp_min(x, 0.0), None),
    "torch.clip": (lambda x: torch.clip(x, 0, 0.5), 0.5),
    "F.hardtanh": (lambda x: F.hardtanh(x, 0, 0.5), 0.5),
    "F.hardtanh(min_val, max_val)": (lambda x: F.hardtanh(x, min_val=0.0, max_val=0.5), 0.5),
    "F.hardtanh(inplace)": (lambda x: F.hardtanh(x, 0.0, 0.5, inplace=True), 0.5),
    "nn.Hardtanh": (nn.Hardtanh(0, 0.5), 0.5),
    "nn.Hardtanh(inplace)": (nn.Hardtanh(0.0, 0.5, inplace=True), 0.5),
}


@pytest.mark.parametrize("form", SITE_FORMS)
def test_each_form_of_an_activation_is_one_site(form):
    operation, ceiling = SITE_FORMS[form]
    traced = faithful(between(operation))
    assert [site.ceiling for site in traced.sites] == [ceiling]
    assert traced.sites[0].shape == (4, 8, 8)
    assert len(traced.coverage.having("neuron")) == 1


def test_a_site_on_features_has_a_shape_of_one_axis():
    traced = faithful(nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 2)))
    assert traced.sites[0].shape == (7,)
    assert traced.sites[0].channels == 7


class ThreeCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.c(self.act(self.b(self.act(self.a(x)))))).mean((2, 3))


def test_a_module_called_three_times_is_three_sites():
    traced = faithful(ThreeCalls())
    assert [site.name for site in traced.sites] == ["act", "act_2", "act_3"]
    assert len({id(traced.at(site)) for site in traced.sites}) == 3


class NameClash(nn.Module):
    """F.relu next to a layer, a parameter and a buffer that bear the names a site would take."""

    def __init__(self):
        super().__init__()
        self.relu = nn.Conv2d(3, 4, 1)
        self.relu_2 = nn.Parameter(torch.ones(1, 4, 1, 1) * 0.5)
        self.register_buffer("relu_3", torch.ones(1, 4, 1, 1) * 0.25)

    def forward(self, x):
        x = F.relu(self.relu(x))
        return F.relu(x * self.relu_2 - self.relu_3).mean((2, 3))


def test_a_site_name_hides_nothing_of_the_source():
    traced = faithful(NameClash())
    assert len({site.name for site in traced.sites} - {"relu", "relu_2", "relu_3"}) == 2


class OwnName(nn.Module):
    """Attribute names that a graph module has a use for itself."""

    def __init__(self, name, layer):
        super().__init__()
        self.name, self.fc = name, nn.Linear(12, 12)
        setattr(self, name, layer)

    def forward(self, x):
        return getattr(self, self.name)(F.relu(self.fc(x.flatten(1))))


@pytest.mark.parametrize("name", ["code", "graph", "meta", "steps", "repeat", "network", "x", "sites", "print_readable"])
@pytest.mark.parametrize("layer", [nn.ReLU, lambda: nn.Linear(12, 6)], ids=["relu", "linear"])
def test_a_layer_may_bear_any_name_or_is_refused_by_it(name, layer):
    net = OwnName(name, layer())
    try:
        faithful(net, images(2, 3, 2))
        spiking(net, images(2, 3, 2))
    except TraceError as error:
        assert name in str(error)


def test_sources_of_sites_are_lines_of_the_user():
    traced = qs.trace(between(lambda x: F.relu(x)), images(1))
    assert re.search(PLACE, traced.sites[0].source)
    assert "F.relu" in traced.sites[0].source


def test_a_network_without_activation_is_refused():
    with pytest.raises(TraceError, match="no activation"):
        qs.trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), images(1))


# Residuals, concatenation, shapes


class Residual(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.join = join

    def forward(self, x):
        x = self.relu(self.stem(x))
        out = self.relu(self.join(self.conv(x), x))
        return out.mean((2, 3))


def iadd(out, identity):
    out += identity
    return out


def add_discarded(out, identity):
    out.add_(identity)
    return out


JOINS = {
    "+": lambda a, b: a + b,
    "+=": iadd,
    "add_ discarded": add_discarded,
    "torch.add": torch.add,
    "torch.add(other=)": lambda a, b: torch.add(a, other=b),
    "a.add(b)": lambda a, b: a.add(b),
    "sub": lambda a, b: a - 0.5 * b,
    "torch.sub": lambda a, b: torch.sub(a, b),
    "sum of a list": lambda a, b: sum([a, b]),
    "weighted": lambda a, b: 0.25 * a + b / 2 - 1,
    "cat": lambda a, b: torch.cat([a, b], 1),
    "cat(dim=-3)": lambda a, b: torch.cat((a, b), dim=-3),
    "concat(dim=1)": lambda a, b: torch.concat((a, b), dim=1),
    "cat(tensors=)": lambda a, b: torch.cat(tensors=[a, b], dim=1),
    "negated": lambda a, b: -a + b,
    "1 - b": lambda a, b: a + (1 - b),
}


@pytest.mark.parametrize("join", JOINS)
def test_residual_joins(join):
    net = Residual(JOINS[join])
    assert len(faithful(net).sites) == 2
    spiking(net)


@pytest.mark.parametrize(
    "join",
    [lambda a, b: torch.add(a, b, alpha=2), lambda a, b: torch.sub(a, b, alpha=2), lambda a, b: torch.add(a, b, alpha=1)],
    ids=["add(alpha=2)", "sub(alpha=2)", "add(alpha=1)"],
)
def test_alpha_is_right_or_refused_by_name(join):
    net = Residual(join)
    try:
        faithful(net)
    except UnsupportedOperatorError as error:
        assert "alpha" in str(error)


class InputJoin(nn.Module):
    """A timed and a constant operand meet: the constant one must be repeated."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        y = F.relu(self.conv(x))
        return torch.cat([x + y, x], 1).mean((2, 3))


def test_a_join_with_the_network_input():
    faithful(InputJoin())
    spiking(InputJoin())


class InPlaceThenReadAgain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        z = F.relu(y, inplace=True)
        z.add_(1.0)
        return (y + z).mean((2, 3))


def test_readers_after_an_in_place_operation_see_its_result():
    faithful(InPlaceThenReadAgain())


class AliasOfIadd(nn.Module):
    """`keep` and `y` are one tensor, so += changes both."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = F.relu(self.conv(x))
        keep = y
        y += 2.0
        return (keep + y).mean((2, 3))


def right_or_trace_error(net, example, x=None):
    """Never wrong numbers: either the graph equals the source on other inputs too, or trace raises."""
    x = images(4, seed=5) if x is None else x
    try:
        traced = qs.trace(net, example)
    except TraceError as error:
        assert "Way out" in str(error)
        return
    with torch.no_grad():
        torch.testing.assert_close(traced.module(x), output_of(net, x), rtol=1e-4, atol=1e-4)


def test_iadd_on_an_alias_is_right_or_refused():
    right_or_trace_error(AliasOfIadd(), images(1))


SHAPES = {
    "flatten": lambda x: x.flatten(1),
    "torch.flatten": lambda x: torch.flatten(x, start_dim=1),
    "torch.flatten(input=)": lambda x: torch.flatten(input=x, start_dim=1),
    "view(size(0), -1)": lambda x: x.view(x.size(0), -1),
    "view(shape[0], -1)": lambda x: x.view(x.shape[0], -1),
    "view(size()[0], -1)": lambda x: x.view(x.size()[0], -1),
    "view((n, -1))": lambda x: x.view((x.size(0), -1)),
    "view([n, -1])": lambda x: x.view([x.size(0), -1]),
    "view(-1, F)": lambda x: x.view(-1, 4 * 8 * 8),
    "view(size(dim=0), -1)": lambda x: x.view(x.size(dim=0), -1),
    "reshape": lambda x: x.reshape(x.size(0), -1),
    "torch.reshape": lambda x: torch.reshape(x, (x.size(0), -1)),
    "torch.reshape(shape=)": lambda x: torch.reshape(x, shape=(x.size(0), -1)),
    "view(n, c*h*w)": lambda x: x.view(x.size(0), x.size(1) * x.size(2) * x.size(3)),
    "unpacked shape": lambda x: x.reshape(x.shape[0], x.shape[1], -1).mean(-1),
    "view(x.shape)": lambda x: x.view(x.shape).flatten(1),
    "view(x.size())": lambda x: x.view(x.size()),
    "shape[1:].numel()": lambda x: x.view(-1, x.shape[1:].numel()),
    "numel // batch": lambda x: x.view(-1, x.numel() // x.size(0)),
    "shape[:2] + (-1,)": lambda x: x.reshape(x.shape[:2] + (-1,)).mean(2),  # noqa: RUF005 - fx cannot unpack
    "view(-1, c, h*w)": lambda x: x.view(-1, x.size(1), x.size(2) * x.size(3)).sum(2),
    "nn.Flatten": nn.Flatten(),
    "nn.Unflatten": nn.Unflatten(1, (2, 2)),
    "mean((2, 3))": lambda x: x.mean((2, 3)),
    "mean([2, 3])": lambda x: x.mean([2, 3]),
    "mean(dim=, keepdim=)": lambda x: x.mean(dim=(-2, -1), keepdim=True),
    "mean twice": lambda x: x.mean(3).mean(2),
    "torch.mean": lambda x: torch.mean(x, [2, 3]),
    "sum": lambda x: x.sum((2, 3)),
    "F.adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "F.adaptive_avg_pool2d((2, 1))": lambda x: F.adaptive_avg_pool2d(x, (2, 1)),
    "F.avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "F.avg_pool2d(stride, padding)": lambda x: F.avg_pool2d(x, 3, stride=2, padding=1),
    "F.avg_pool2d(size()[2:])": lambda x: F.avg_pool2d(x, x.size()[2:]),
    "F.avg_pool2d(kernel_size=shape)": lambda x: F.avg_pool2d(x, kernel_size=x.shape[-1]),
    "nn.AvgPool2d": nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
    "nn.AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d((1, 1)),
    "F.pad": lambda x: F.pad(x, (1, 1, 0, 2)),
    "F.pad(value)": lambda x: F.pad(x, [1, 1, 0, 2], "constant", 0.5),
    "option A shortcut": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0),
    "slicing": lambda x: x[:, 1:, ::2, :-1],
    "slicing by half": lambda x: x[:, : x.size(1) // 2],
    "ellipsis": lambda x: x[..., 0],
    "indexing by None": lambda x: x[:, None, 0],
    "chunk": lambda x: x.chunk(2, 1)[0],
    "torch.chunk": lambda x: torch.chunk(x, 2, dim=1)[1],
    "split": lambda x: x.split(2, dim=1)[1],
    "torch.split": lambda x: torch.split(x, [1, 3], 1)[1],
    "narrow": lambda x: x.narrow(1, 0, 2),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "permute((..))": lambda x: x.permute((0, 2, 3, 1)),
    "transpose": lambda x: x.transpose(1, 2),
    "squeeze": lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "interpolate to shape": lambda x: F.interpolate(F.avg_pool2d(x, 2), x.shape[-2:], mode="bilinear"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "channel shuffle": lambda x: x.view(x.size(0), 2, 2, 8, 8).transpose(1, 2).contiguous().view(x.size(0), -1, 8, 8),
    "normalised": lambda x: (x - torch.tensor([0.5])) / torch.tensor([2.0]),
    "clone": lambda x: x.clone(),
    "torch.div(other=)": lambda x: torch.div(x, other=2.0),
    "sliced then written out": lambda x: x[:, 0:1] + x[:, 1:2] * 2 - x[:, 2:] / 3,
}


def _records_sizes():
    """Whether the torch.fx of this torch sees sizes of a tensor among the arguments of a torch function (2.8 does not)."""
    try:
        torch.fx.symbolic_trace(lambda x: torch.reshape(x, (x.size(0), -1)))
    except TypeError:
        return False
    return True


SIZES_TO_FUNCTIONS = {"torch.reshape", "torch.reshape(shape=)", "F.avg_pool2d(size()[2:])", "F.avg_pool2d(kernel_size=shape)"}


@pytest.mark.parametrize("form", SHAPES)
def test_affine_operators_after_a_site(form):
    operation = SHAPES[form]
    if form in SIZES_TO_FUNCTIONS and not _records_sizes():
        with pytest.raises(TraceError, match=r"call the method of the tensor"):
            qs.trace(between(_after_relu(operation)), images(2))
        pytest.skip("this torch cannot record sizes given to a torch function; it was refused with the way out")
    net = between(_after_relu(operation))
    assert len(faithful(net).sites) == 1
    spiking(net, steps=2)


def _after_relu(operation):
    if isinstance(operation, nn.Module):
        return nn.Sequential(nn.ReLU(), operation)
    return lambda x: operation(F.relu(x))


class SizeOfTheInput(nn.Module):
    """The batch size is taken where time has not begun and used where it has."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.fc, self.how = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 5), how

    def forward(self, x):
        if self.how == "size":
            n = x.size(0)
        elif self.how == "shape":
            n = x.shape[0]
        else:
            n, _c, _h, _w = x.shape
        x = torch.relu(self.conv(x))
        x = x.view(n, 4, -1)
        return self.fc(x.reshape(n, 256))


@pytest.mark.parametrize("how", ["size", "shape", "unpacked"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_batch_size_taken_from_the_input_survives_time(how, batch):
    net = SizeOfTheInput(how)
    faithful(net)
    snn = spiking(net, images(batch), steps=5)
    with torch.no_grad():
        together = snn(images(4))
        apart = torch.cat([snn(image) for image in images(4).split(1)])
    torch.testing.assert_close(together, apart)


def test_a_converted_network_converges_to_its_source():
    converges(SizeOfTheInput("size"), images(4))


def test_max_pooling_that_stays_behind_a_sum_converges():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)

        def forward(self, x):
            return F.max_pool2d(F.relu(self.a(x)) + F.relu(self.b(x)), 2).flatten(1)

    converges(Net(), images(4))


# Dropout


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.drop = nn.Dropout(0.9, inplace=True)
        self.drop2d = nn.Dropout2d(0.9)

    def forward(self, x):
        x = self.drop2d(F.relu(self.conv(x)))
        x = F.dropout(x.mean((2, 3)), 0.9, self.training)
        x = F.dropout(x, p=0.9, training=self.training, inplace=True)
        return self.fc(self.drop(x))


def test_dropout_is_removed_though_the_source_is_in_training_mode():
    net = WithDropout().train()
    traced = faithful(net)
    assert len(traced.coverage.having("removed")) == 4
    assert net.training
    assert not any("drop" in str(node.target) for node in traced.module.graph.nodes)


class DropoutByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x):
        return F.dropout(input=self.act(input=self.conv(input=x)), p=0.5, training=self.training).mean((2, 3))


def test_tensors_may_be_passed_by_keyword():
    assert len(faithful(DropoutByKeyword()).sites) == 1


# Batch norm


def types_in(traced):
    return [type(module) for module in traced.module.modules()]


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()],
        lambda: [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()],
        lambda: [nn.Conv2d(3, 6, 3, groups=3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6, affine=False), nn.ReLU()],
        lambda: [nn.Conv2d(3, 4, 3), nn.Dropout(), nn.BatchNorm2d(4, eps=0.1), nn.ReLU(inplace=True)],
        lambda: [nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU()],
        lambda: [nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4), nn.ReLU()],
        lambda: [nn.Flatten(), nn.Linear(192, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU()],
        lambda: [nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU()],
    ],
    ids=[
        "conv",
        "conv without bias",
        "grouped, bn without affine",
        "dropout between",
        "transposed",
        "linear",
        "no bias",
        "linear, bn plain",
    ],
)
def test_a_batch_norm_after_a_layer_is_folded(layers):
    traced = faithful(lively(nn.Sequential(*layers())))
    assert not {nn.BatchNorm1d, nn.BatchNorm2d, Affine} & set(types_in(traced))
    assert len(traced.coverage.having("folded")) == 1


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3)],
        lambda: [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.AvgPool2d(2)],
        lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, affine=False)],
        lambda: [nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU()],
        lambda: [nn.Flatten(2), nn.Linear(64, 4), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)],
        lambda: [nn.Flatten(2), nn.Linear(64, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)],
        lambda: [nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 4), nn.ReLU()],
    ],
    ids=["pre-activation", "after relu", "twice", "grouped transposed", "linear on tokens", "linear on square tokens", "features"],
)
def test_a_batch_norm_without_a_layer_before_it_becomes_affine(layers):
    net = lively(nn.Sequential(*layers()))
    x = images(channels=4) if isinstance(net[0], nn.ConvTranspose2d) else images()
    traced = faithful(net, x)
    assert not {nn.BatchNorm1d, nn.BatchNorm2d} & set(types_in(traced))
    spiking(net, x, steps=2)


class SharedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        x = F.relu(self.first(self.conv(x)))
        return F.relu(self.second(self.conv(x))).mean((2, 3))


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.norm(self.b(F.relu(self.norm(self.a(x)))))).mean((2, 3))


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return (F.relu(self.norm(y)) + F.relu(y)).mean((2, 3))


class TiedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3))


class OneLayerTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)
        self.b = self.a
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.norm(self.b(F.relu(self.a(x))))).mean((2, 3))


@pytest.mark.parametrize("cls", [SharedConv, SharedNorm, TwoReaders, TiedWeights, OneLayerTwoNames])
def test_folding_respects_what_is_shared(cls):
    net = lively(cls())
    assert len(faithful(net).sites) == 2
    spiking(net)


# Max-pooling


def pools_of(traced):
    layers = dict(traced.module.named_modules())
    return [node for node in traced.module.graph.nodes if node.op == "call_module" and type(layers[node.target]) in MAX_POOLS]


def pools_before_neurons(traced):
    """Every pool reads no site, and only sites read it."""
    names = {site.name for site in traced.sites}
    return all(
        pool.args[0].target not in names and all(user.target in names or user in pools_of(traced) for user in pool.users)
        for pool in pools_of(traced)
    )


POOLS = {
    "nn.MaxPool2d": nn.MaxPool2d(2),
    "nn.MaxPool2d padded": nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
    "nn.AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(2),
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2),
    "F.max_pool2d(stride)": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "F.max_pool2d(keywords)": lambda x: F.max_pool2d(x, kernel_size=(2, 2), stride=(2, 2), ceil_mode=True),
    "F.max_pool2d(input=)": lambda x: F.max_pool2d(input=x, kernel_size=2),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, 2),
    "F.adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 1),
    "F.adaptive_max_pool2d((2, None))": lambda x: F.adaptive_max_pool2d(x, (2, None)),
    "pool of a pool": lambda x: F.max_pool2d(F.max_pool2d(x, 2), 2),
    "dropout between": nn.Sequential(nn.Dropout(), nn.MaxPool2d(2)),
    "of one tensor cat": lambda x: F.max_pool2d(torch.cat([x], 1), 2),
}


@pytest.mark.parametrize("form", POOLS)
def test_max_pooling_moves_in_front_of_the_neuron(form):
    net = between(_after_relu(POOLS[form]))
    traced = faithful(net)
    assert pools_of(traced)
    assert pools_before_neurons(traced)
    assert len(traced.sites) == 1
    spiking(net)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0, 0.3)])
def test_the_site_moves_behind_the_pool_with_its_ceiling_and_shape(activation):
    traced = faithful(between(nn.Sequential(activation, nn.MaxPool2d(2))))
    assert traced.sites[0].shape == (4, 4, 4)
    assert traced.sites[0].name == "operation.0"


def test_a_pool_in_front_stays_in_front():
    traced = faithful(between(nn.Sequential(nn.MaxPool2d(2), nn.ReLU())))
    assert pools_before_neurons(traced)
    assert len(traced.sites) == 1


class Branches(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.a, self.b, self.pool, self.dim = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), dim

    def forward(self, x):
        return self.pool(torch.cat([F.relu(self.a(x)), torch.cat((F.relu6(self.b(x)), F.relu(x)), dim=self.dim)], dim=self.dim)).flatten(1)


@pytest.mark.parametrize("dim", [1, -3])
def test_max_pooling_moves_through_concatenation(dim):
    traced = faithful(Branches(dim))
    assert len(traced.sites) == 3
    assert pools_before_neurons(traced)
    spiking(Branches(dim))


class PartlyActive(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.pool = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.MaxPool2d(2)

    def forward(self, x):
        y = F.relu(self.a(x))
        return self.pool(torch.cat([self.b(y), y], 1)).flatten(1)


def test_max_pooling_of_a_partly_active_concatenation():
    traced = faithful(PartlyActive())
    names = {site.name for site in traced.sites}
    assert not any(pool.args[0].target in names for pool in pools_of(traced))
    spiking(PartlyActive())


class PoolAndLayer(nn.Module):
    """The fire module of SqueezeNet and the stem of U-Nets: one activation, read by a pool and by a layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.skip, self.deep = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        return F.relu(self.deep(self.pool(x)) + self.skip(x)).mean((2, 3))


def test_an_activation_read_by_a_pool_and_a_layer_gets_a_twin():
    traced = faithful(PoolAndLayer())
    assert len(traced.sites) == 3
    assert len({site.name for site in traced.sites}) == 3
    assert pools_before_neurons(traced)
    spiking(PoolAndLayer())


class OnePoolThreeCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2)

    def forward(self, x):
        x = self.pool(F.relu(self.a(x)))
        y = self.pool(F.relu(self.b(x)) + x)
        return self.pool(y + 1).flatten(1)


def test_one_pool_called_thrice_keeps_its_states_apart():
    faithful(OnePoolThreeCalls())
    spiking(OnePoolThreeCalls())


# The source stays as it is


class Busy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.pool, self.drop, self.fc = nn.MaxPool2d(2), nn.Dropout(0.5), nn.Linear(36, 5)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.fc(self.drop(self.pool(self.act(self.norm(self.conv(x))))).flatten(1))


class BusyAndRefused(Busy):
    def forward(self, x):
        return torch.sigmoid(super().forward(x))


class BusyAndUntraceable(Busy):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else x


def snapshot(net):
    return {
        "state": {name: (value.clone(), value.data_ptr(), value._version) for name, value in net.state_dict(keep_vars=True).items()},
        "modes": {name: module.training for name, module in net.named_modules()},
        "attributes": {name: set(vars(module)) for name, module in net.named_modules()},
        "modules": {name: id(module) for name, module in net.named_modules()},
        "grads": {name: (p.requires_grad, p.grad) for name, p in net.named_parameters()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in net.named_modules()},
        "calls": net.calls,
    }


def assert_same(before, after):
    for name, (value, *rest) in before.pop("state").items():
        other, *other_rest = after["state"][name]
        assert torch.equal(value, other)
        assert rest == other_rest
    after.pop("state")
    assert before == after


def _try(action):
    with contextlib.suppress(QuickspikeError):
        action()


@pytest.mark.parametrize("cls", [Busy, BusyAndRefused, BusyAndUntraceable])
@pytest.mark.parametrize("verb", [qs.trace, qs.inspect, lambda net, x: qs.convert(net, x, steps=2)], ids=["trace", "inspect", "convert"])
def test_the_source_is_untouched(cls, verb):
    net = lively(cls())
    net.norm.eval()
    net.conv.weight.requires_grad_(False)
    before = snapshot(net)
    _try(lambda: verb(net, images(2)))
    assert_same(before, snapshot(net))


def test_a_traced_network_shares_no_memory_with_its_source():
    net = Busy()
    traced = qs.trace(net, images(1))
    theirs = {p.data_ptr() for p in net.state_dict().values()}
    assert not theirs & {p.data_ptr() for p in traced.module.state_dict().values()}


def test_the_random_state_is_untouched():
    net, x = Busy(), images(2)
    before = torch.get_rng_state()
    qs.convert(net, x, steps=2).run(x)
    assert torch.equal(before, torch.get_rng_state())


class NormalisesInPlace(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 4, 3), how
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))

    def forward(self, x):
        if self.how == "method":
            x.sub_(self.mean).div_(0.25)
        else:
            x -= self.mean
            x /= 0.25
        return F.relu(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize("how", ["method", "operator"])
def test_a_network_that_changes_its_input_in_place(how):
    x, net = images(), NormalisesInPlace(how)
    kept = x.clone()
    traced = qs.trace(net, x)
    qs.inspect(net, x)
    assert torch.equal(x, kept)
    with torch.no_grad():
        torch.testing.assert_close(traced.module(x.clone()), output_of(net, x))


# Refusals


REFUSED = {
    "softmax": (lambda x: F.relu(x).flatten(1).softmax(-1), "softmax", "logits"),
    "nn.Softmax": (nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Softmax(1)), "Softmax", "logits"),
    "F.log_softmax": (lambda x: F.log_softmax(F.relu(x).flatten(1), 1), "log_softmax", "logits"),
    "nn.LogSoftmax": (nn.Sequential(nn.ReLU(), nn.Flatten(), nn.LogSoftmax(1)), "LogSoftmax", "logits"),
    "LayerNorm": (nn.Sequential(nn.ReLU(), nn.LayerNorm([4, 8, 8])), "LayerNorm", "batch norm"),
    "F.layer_norm": (lambda x: F.layer_norm(F.relu(x), [4, 8, 8]), "layer_norm", "batch norm"),
    "GroupNorm": (nn.Sequential(nn.ReLU(), nn.GroupNorm(2, 4)), "GroupNorm", "batch norm"),
    "InstanceNorm": (nn.Sequential(nn.ReLU(), nn.InstanceNorm2d(4)), "InstanceNorm2d", "batch norm.*analog"),
    "square": (lambda x: F.relu(x) ** 2, "pow", "analog"),
    "division by a signal": (lambda x: F.relu(x) / (x + 10), "div", "constant"),
    "1 / x": (lambda x: 1 / (F.relu(x) + 1), "div", "constant"),
    "matmul": (lambda x: torch.matmul(F.relu(x), x.transpose(2, 3)), "matmul", "convolutional network.*analog"),
    "@": (lambda x: F.relu(x) @ x.transpose(2, 3), "matmul", "convolutional network.*analog"),
    "einsum": (lambda x: torch.einsum("bchw,bcvw->bchv", F.relu(x), x), "einsum", "convolutional network"),
    "floor division": (lambda x: F.relu(x) // 0.1, "floordiv", "operator"),
    "div(rounding_mode)": (lambda x: torch.div(F.relu(x), 0.1, rounding_mode="floor"), "div", ""),
    "F.dropout": (lambda x: F.dropout(F.relu(x)), "dropout", r"training=self\.training"),
    "F.dropout(training=True)": (lambda x: F.dropout(F.relu(x), 0.5, True), "dropout", r"training=self\.training"),
    "F.dropout2d": (lambda x: F.dropout2d(F.relu(x), 0.5), "dropout", r"training=self\.training"),
    "clamp(0, tensor)": (lambda x: x.clamp(torch.zeros(1), torch.ones(1)), "clamp", "fixed numbers"),
    "batch norm without statistics": (nn.BatchNorm2d(4, track_running_stats=False), "BatchNorm", "track_running_stats=True"),
    "x.mean(0)": (lambda x: F.relu(x) - F.relu(x).mean(0), "mean", "batch"),
    "x.mean(0, keepdim)": (lambda x: F.relu(x) - x.mean(dim=0, keepdim=True), "mean", "batch"),
    "x.mean((0, 2, 3))": (lambda x: F.relu(x) - x.mean((0, 2, 3)).view(1, -1, 1, 1), "mean", "batch"),
    "x.mean(-4)": (lambda x: F.relu(x) - x.mean(-4), "mean", "batch"),
    "x.sum()": (lambda x: F.relu(x) - x.sum(), "sum", "axes|batch"),
    "torch.sum(x, 0)": (lambda x: F.relu(x) - torch.sum(x, 0), "sum", "batch"),
    "x[0]": (lambda x: F.relu(x) + x[0], "getitem", "batch"),
    "x[:1]": (lambda x: F.relu(x) + x[:1], "getitem", "batch"),
    "x[-1:]": (lambda x: F.relu(x) + x[-1:], "getitem", "batch"),
    "y[: x.size(0)]": (lambda x: F.relu(x)[: x.size(0)], "getitem", ""),
    "x.split(1, 0)": (lambda x: F.relu(x) + x.split(1, 0)[0], "split|getitem", "batch"),
    "x.narrow(0, 0, 1)": (lambda x: F.relu(x) + x.narrow(0, 0, 1), "narrow", "batch"),
    "view(1, -1)": (lambda x: F.relu(x).view(1, -1).view(-1, 256), "reshape", "batch"),
    "permute(1, 0, 2, 3)": (lambda x: F.relu(x).permute(1, 0, 2, 3).permute(1, 0, 2, 3), "permute", "batch"),
    "transpose(0, 1)": (lambda x: F.relu(x).transpose(0, 1).transpose(0, 1), "transpose", "batch"),
    "flatten()": (lambda x: F.relu(x).flatten().view(-1, 256), "flatten", "batch"),
    "cat on axis 0": (lambda x: torch.cat([F.relu(x), x])[: x.size(0)], "cat", "batch"),
    "chunk on axis 0": (lambda x: F.relu(x).repeat(2, 1, 1, 1).chunk(2)[0], "repeat", "batch|operator"),
    "times the batch size": (lambda x: F.relu(x) * x.size(0), "mul", ""),
    "over the batch size": (lambda x: F.relu(x) / x.shape[0], "div", ""),
    "plus the batch size": (lambda x: F.relu(x) + x.size(0), "add", ""),
    "max_pool with indices": (lambda x: F.max_pool2d(F.relu(x), 2, return_indices=True)[0], "max_pool", "average pooling"),
    "view(1, F)": (lambda x: F.relu(x).view(1, 256), "reshape", "batch"),
    "index by a signal": (lambda x: F.relu(x)[:, (x > 0).any()], "", ""),
    "where": (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), "zeros_like", "operator"),
    "where(relu)": (lambda x: torch.where(F.relu(x) > 0.1, x, 0.0), "where.*gt|gt.*where", "analog"),
    "abs": (lambda x: F.relu(x).abs(), "abs", "analog"),
    "amax": (lambda x: F.relu(x).amax((2, 3)), "amax", "analog"),
    "torch.std": (lambda x: F.relu(x) - F.relu(x).std((2, 3), keepdim=True), "std", "analog"),
    "cdist": (lambda x: torch.cdist(F.relu(x), x), "cdist", "operator"),
    "weights from the input": (lambda x: F.conv2d(F.relu(x), x[:1]), "conv2d|getitem", "fixed weights|batch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_operator_line_and_way_out(case):
    operation, operator, way_out = REFUSED[case]
    net = Between(operation, head=False)
    with pytest.raises(UnsupportedOperatorError) as caught:
        qs.trace(net, images(2))
    message = str(caught.value)
    assert re.search(operator, message)
    assert re.search(PLACE, message)
    assert re.search(f"Way out: .*({way_out})", message)
    assert "Between" in message


@pytest.mark.parametrize("case", REFUSED)
def test_inspect_lists_a_refusal_without_raising(case):
    coverage = qs.inspect(Between(REFUSED[case][0], head=False), images(2))
    assert not coverage.convertible
    assert all(finding.way_out and finding.reason and finding.source for finding in coverage.unsupported)


class MaxPoolIndices(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2, return_indices=True)

    def forward(self, x):
        x, _indices = self.pool(F.relu(x))
        return x.mean((2, 3))


def test_a_pooling_layer_that_returns_indices_is_refused():
    with pytest.raises(UnsupportedOperatorError, match=r"indices.*Way out: use average pooling"):
        qs.trace(MaxPoolIndices(), images(1))


class MultiplyByARectifiedWeight(nn.Module):
    """A site on a parameter has no batch: right, or refused, never wrong."""

    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 1), nn.Parameter(torch.linspace(-1, 1, 4).view(1, 4, 1, 1))

    def forward(self, x):
        return (F.relu(self.conv(x)) * F.relu(self.scale)).mean((2, 3))


def test_an_activation_of_a_parameter_is_no_neuron():
    net = MultiplyByARectifiedWeight()
    try:
        traced = faithful(net)
    except UnsupportedOperatorError:
        return
    assert len(traced.sites) == 1
    spiking(net)


class ScaledByAConstant(nn.Module):
    """Anything may be done to parameters; they are no signals."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 4, 1), nn.Parameter(torch.zeros(1, 4, 1, 1))

    def forward(self, x):
        return (F.relu(self.conv(x)) * torch.sigmoid(self.gate)).mean((2, 3))


def test_functions_of_parameters_are_right_or_refused():
    net = ScaledByAConstant()
    try:
        faithful(net)
        spiking(net)
    except UnsupportedOperatorError as error:
        assert "sigmoid" in str(error)


class DependsOnData(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return F.relu(x).mean((2, 3))
        return x.mean((2, 3))


class DependsOnShape(nn.Module):
    def forward(self, x):
        if x.shape[2] % 2 == 1:
            x = F.pad(x, (0, 1, 0, 1))
        return F.relu(x).mean((2, 3))


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("no luck today")


class AssignsSlices(nn.Module):
    def forward(self, x):
        y = F.relu(x)
        y[:, 0] = 0
        return y.mean((2, 3))


@pytest.mark.parametrize("cls", [DependsOnData, AssignsSlices])
def test_what_cannot_be_recorded_is_refused_with_its_line(cls):
    with pytest.raises(TraceError, match=rf"(?s){cls.__name__}.*{PLACE}.*Way out"):
        qs.trace(cls(), images(1))
    coverage = qs.inspect(cls(), images(1))
    assert not coverage.convertible
    assert coverage.unsupported[0].way_out


def test_control_flow_on_shapes_works_or_is_not_recommended():
    try:
        faithful(DependsOnShape())
    except TraceError as error:
        assert "depend on shapes only" not in str(error)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused_with_the_way_out():
    scripted = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval(), images(1))
    with pytest.raises(TraceError, match=r"a TorchScript module cannot be recorded\. Way out: give the module"):
        qs.trace(scripted, images(1))
    assert not qs.inspect(scripted, images(1)).convertible


def test_a_network_that_cannot_run_on_the_example_is_named():
    with pytest.raises(DataError, match="Raises cannot run"):
        qs.trace(Raises(), images(1))


@pytest.mark.parametrize(
    "example",
    [torch.zeros(0, 3, 8, 8), torch.zeros(3), torch.full((1, 3, 8, 8), float("nan")), torch.zeros(1, 3, 8, 8, dtype=torch.long), [1, 2]],
    ids=["empty", "no batch", "nan", "integers", "list"],
)
def test_an_unusable_example_is_refused(example):
    with pytest.raises(DataError):
        qs.trace(Busy(), example)


class ManyProblems(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 5)

    def forward(self, x):
        x = torch.abs(self.norm(self.conv(x).relu()))
        x = x / torch.exp(x)
        x = torch.abs(x + 1)
        return torch.softmax(self.fc(F.dropout(F.relu(x)).mean((2, 3))), -1)


def test_inspect_lists_every_refusal():
    net = ManyProblems()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    coverage = qs.inspect(net, images(2))
    assert [f.operator for f in coverage.unsupported] == ["GroupNorm", "abs", "exp", "div", "abs", "dropout", "softmax"]
    assert len(coverage.having("neuron")) == 2
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert "does not convert" in str(coverage)
    assert coverage.to_json()["convertible"] is False


def test_trace_names_every_kind_of_refusal_at_once():
    with pytest.raises(UnsupportedOperatorError) as caught:
        qs.trace(ManyProblems(), images(2))
    message = str(caught.value)
    assert all(name in message for name in ("GroupNorm", "abs x2", "exp", "div", "dropout", "softmax", "7 unsupported"))


def test_inspect_says_what_stays_analog():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 5))
    assert [f.status for f in qs.inspect(net, images(1)).findings] == ["analog", "folded", "neuron", "removed", "synapse", "synapse"]


# In-place operations that a recording cannot see


class Aliased(nn.Module):
    """An in-place operation on a view changes the tensor it is a view of."""

    def __init__(self, spoil):
        super().__init__()
        self.conv, self.spoil = nn.Conv2d(3, 4, 3, padding=1, bias=False), spoil

    def forward(self, x):
        x = self.conv(x)
        self.spoil(x)
        return F.relu(x + 1).mean((2, 3))


SPOILERS = {
    "slice.relu_": lambda x: x[:, :2].relu_(),
    "view.relu_": lambda x: x.view(x.size(0), -1).relu_(),
    "flatten.clamp_": lambda x: x.flatten(1).clamp_(0, 1),
    "contiguous.mul_": lambda x: x.contiguous().mul_(2),
    "chunk.relu_": lambda x: F.relu(x.chunk(2, 1)[0], inplace=True),
    "transpose.mul_": lambda x: x.transpose(1, 2).mul_(3),
    "detach.relu_": lambda x: x.detach().relu_(),
    "nn.Identity": nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)),
    "nn.Dropout": nn.Sequential(nn.Dropout(), nn.ReLU(inplace=True)),
    "nn.Flatten": nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True)),
    "iadd": lambda x: operator.iadd(x[:, 0], 1.0),
    "eval dropout.relu_": lambda x: F.dropout(x, 0.5, False).relu_(),
}


@pytest.mark.parametrize("form", SPOILERS)
@pytest.mark.parametrize("example", ["noise", "zeros"])
def test_in_place_on_a_view_never_gives_wrong_numbers(form, example):
    x = images(1) if example == "noise" else torch.zeros(1, 3, 8, 8)
    right_or_trace_error(Aliased(SPOILERS[form]), x)


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 4)

    def forward(self, x):
        return F.relu(self.fc(x.flatten(1))) + torch.rand(4)


class ChangesFromCallToCall(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.calls = nn.Linear(192, 4), 0

    def forward(self, x):
        self.calls += 1
        return F.relu(self.fc(x.flatten(1))) * self.calls


@pytest.mark.parametrize("cls", [Random, ChangesFromCallToCall])
def test_randomness_and_state_are_refused(cls):
    with pytest.raises(TraceError, match="does not compute what the network computes"):
        qs.trace(cls(), images(1))


# Other plausible ways to write a network


class OptionalArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 4)

    def forward(self, x, mask=None, return_features: bool = False, scale: float = 2.0):
        x = F.relu(self.fc(x.flatten(1))) * scale
        if mask is not None:
            x = x * mask
        return (x, x) if return_features else x


def test_arguments_with_defaults_keep_them():
    assert len(faithful(OptionalArguments()).sites) == 1
    spiking(OptionalArguments())


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(12) * 0.5) for _ in range(3)])
        self.acts = nn.ModuleDict({"on": nn.ReLU(), "off": nn.Identity()})

    def forward(self, x):
        x = x.flatten(1)
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = self.acts["on"](layer(x) * scale) + self.acts["off"](x)
        return x


def test_lists_and_dictionaries_of_layers():
    net = Parts()
    assert [site.name for site in faithful(net, images(2, 3, 2)).sites] == ["acts.on", "acts.on_2", "acts.on_3"]
    spiking(net, images(2, 3, 2))


class MyReLU(nn.ReLU):
    pass


class Twice(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_run_their_own_code():
    traced = faithful(lively(nn.Sequential(Twice(3, 4, 3), nn.BatchNorm2d(4), MyReLU(), nn.Flatten(), nn.Linear(144, 2))))
    assert len(traced.sites) == 1


class Unregistered(nn.Module):
    """Beginners' code: layers without weights made on the fly, or kept in a plain list."""

    def __init__(self, layers):
        super().__init__()
        self.fc, self.layers = nn.Linear(192, 4), layers

    def forward(self, x):
        x = nn.ReLU()(self.fc(nn.Flatten()(x)))
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("layers", [[], [nn.ReLU(), nn.Identity()], [nn.Linear(4, 4)]], ids=["inline", "list", "weights in a list"])
def test_unregistered_layers_work_or_are_named(layers):
    net = Unregistered(layers)
    try:
        faithful(net)
        spiking(net)
    except TraceError as error:
        assert re.search(PLACE, str(error))
        assert "depend on shapes only" not in str(error)


def doubled(module, inputs, output):
    return 2 * output


@pytest.mark.parametrize("layer", ["conv", "norm", "act", "fc", "pool", "drop", ""])
def test_a_hook_that_changes_an_output_is_obeyed_or_refused(layer):
    net = lively(Busy())
    net.get_submodule(layer).register_forward_hook(doubled)
    right_or_trace_error(net, images(1))


@pytest.mark.parametrize("layer", ["conv", "act", ""])
def test_a_hook_that_records_sees_nothing_of_the_tracing(layer):
    net, seen = Busy(), []
    net.get_submodule(layer).register_forward_hook(lambda module, inputs, output: seen.append(output))
    _try(lambda: qs.convert(net, images(1), steps=2).run(images(1)))
    assert seen == []


def _pruned():
    net = Busy()
    torch.nn.utils.prune.l1_unstructured(net.conv, "weight", amount=0.5)
    return net


def _pruned_and_run():
    net = _pruned().eval()
    with torch.no_grad():
        net(images(1))
    return net


def _normed(utility):
    def make():
        net = Busy()
        utility(net.conv)
        return net

    return make


@pytest.mark.parametrize(
    "make",
    [
        _pruned,
        _pruned_and_run,
        _normed(torch.nn.utils.parametrizations.weight_norm),
        _normed(torch.nn.utils.parametrizations.spectral_norm),
    ],
    ids=["pruned", "pruned and run", "weight_norm", "spectral_norm"],
)
def test_reparametrised_weights_are_right_or_refused(make):
    net = lively(make())
    try:
        traced = qs.trace(net, images(1))
    except TraceError:
        return
    with torch.no_grad():
        torch.testing.assert_close(traced.module(images()), net.eval()(images()), rtol=1e-4, atol=1e-4)


def test_a_recorded_graph_can_be_traced_again():
    traced = faithful(torch.fx.symbolic_trace(lively(Named())))
    assert len(traced.sites) == 2
    assert len(faithful(traced.module).sites) == 2


class Quantisable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.join = nn.Conv2d(3, 3, 1), torch.ao.nn.quantized.FloatFunctional()
        self.stub = torch.ao.quantization.QuantStub()

    def forward(self, x):
        x = self.stub(x)
        return self.join.add_relu(self.conv(x), x).mean((2, 3))


def test_float_functionals_are_seen_through_or_refused():
    right_or_trace_error(Quantisable(), images(1))


def test_a_data_parallel_network_works_or_is_refused():
    right_or_trace_error(nn.DataParallel(lively(Busy())), images(1))


class Checkpointed(Busy):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


def test_activation_checkpointing_works_or_is_refused():
    right_or_trace_error(lively(Checkpointed()), images(1))


class WithoutGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 4)

    @torch.no_grad()
    def forward(self, x):
        with torch.no_grad():
            return F.relu(self.fc(x.flatten(1)))


def test_a_forward_without_gradients():
    faithful(WithoutGrad())


class Checks(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 4)

    def forward(self, x):
        torch._assert(x.shape[1] == 3, "three channels")
        return F.relu(self.fc(x.flatten(1)))


def test_recorded_assertions_disappear():
    faithful(Checks())
    assert "assert" not in spiking(Checks()).code


class OneNumberEach(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 1)

    def forward(self, x):
        return F.relu(self.fc(x.flatten(1)).squeeze(-1))


def test_an_output_of_one_number_per_sample_works_or_is_refused():
    try:
        faithful(OneNumberEach())
        spiking(OneNumberEach())
    except QuickspikeError as error:
        assert "Way out" in str(error)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_output_shape_that_squeeze_changes_is_kept_or_refused(steps, batch):
    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            return self.pool(F.relu(self.conv(x))).squeeze()

    try:
        snn = qs.convert(Squeezed(), images(2), steps=steps)
    except QuickspikeError as error:
        assert re.search("squeeze", str(error))
        return
    with torch.no_grad():
        assert snn.run(images(batch)).logits.shape == (steps, batch, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    net = lively(Busy()).to(dtype)
    x = images().to(dtype)
    traced = qs.trace(net, x)
    with torch.no_grad():
        tolerance = 1e-9 if dtype is torch.float64 else 0.1
        torch.testing.assert_close(traced.module(x), output_of(net, x), rtol=tolerance, atol=tolerance)


def test_one_dimensional_and_three_dimensional_networks():
    audio = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    video = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    for net, shape in ((audio, (2, 2, 16)), (video, (2, 1, 6, 6, 6))):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        assert pools_before_neurons(faithful(lively(net), x))
        spiking(net, x)


# The printed forward pass


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Linear(144, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.classifier(self.body(x).flatten(1))


def test_the_printed_forward_mentions_the_names_of_the_source():
    snn = qs.convert(Named(), images(2), steps=2)
    for name in ("self.stem", 'getattr(self.body, "0")', 'getattr(self.body, "2")', "self.classifier", "flatten", "self.relu"):
        assert name in snn.code
    assert "activate" not in snn.code
    assert [site.name for site in snn.sites] == ["relu", "body.2"]
    assert all(snn.neuron(site.name).threshold.shape == (4, 1, 1) for site in snn.sites)


# Random networks


class RandomBlock(nn.Module):
    def __init__(self, channels, kind, activation, norm):
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.kind, self.activation = kind, activation

    def forward(self, x):
        y = self.activation(self.norm(self.a(x)))
        if self.kind == "residual":
            return self.activation(self.b(y) + x)
        if self.kind == "in-place residual":
            y += x
            return y.relu_()
        if self.kind == "dense":
            return torch.cat([y, x], 1)[:, : x.size(1)]
        if self.kind == "pre-activation":
            return x + self.b(self.activation(self.norm(x)))
        return y


class RandomNet(nn.Module):
    def __init__(self, channels, blocks, pools):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(RandomBlock(channels, *block) for block in blocks)
        self.pools, self.fc = nn.ModuleList(pools), nn.Linear(channels, 3)

    def forward(self, x):
        n = x.size(0)
        x = torch.relu(self.stem(x))
        for block, pool in zip(self.blocks, self.pools, strict=True):
            x = pool(block(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).view(n, -1))


BLOCKS = st.tuples(
    st.sampled_from(["plain", "residual", "in-place residual", "dense", "pre-activation"]),
    st.sampled_from([nn.ReLU(), nn.ReLU(inplace=True), F.relu, nn.ReLU6(), lambda x: x.clamp(0, 1)]),
    st.booleans(),
)
POOLINGS = st.sampled_from([nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(2, ceil_mode=True), nn.Dropout(0.5)])


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(channels=st.integers(1, 5), layers=st.lists(st.tuples(BLOCKS, POOLINGS), min_size=0, max_size=3), seed=st.integers(0, 10))
def test_random_networks_equal_their_source(channels, layers, seed):
    torch.manual_seed(seed)
    net = lively(RandomNet(channels, [block for block, _ in layers], [pool for _, pool in layers]))
    traced = faithful(net, images(2, seed=seed))
    assert len(traced.sites) >= 1 + sum(block[0] != "dense" for block, _ in layers)
    spiking(net, images(2, seed=seed), steps=2)


def test_wrappers_are_seen_through():
    net = Parts().eval()
    source = faithful(net, images(2, 3, 2))
    for wrapped in (nn.DataParallel(net), torch.compile(net, backend="eager")):
        assert [site.name for site in qs.trace(wrapped, images(2, 3, 2)).sites] == [site.name for site in source.sites]


class Tents(nn.Module):
    """A tent map many times over: it doubles every difference each time, rounding too."""

    def __init__(self, times):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(times):
            hidden, norm, out = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)
            with torch.no_grad():
                # Weights that folding has to round: with 1 some processors give the same answers bit for bit.
                hidden.weight.copy_(torch.tensor([0.7, 0.7]).view(2, 1, 1, 1))
                hidden.bias.copy_(torch.tensor([0.0, -0.35]))
                norm.running_var.copy_(torch.tensor([3.0, 7.0]))
                norm.weight.copy_((norm.running_var + norm.eps).sqrt() / 0.7)
                out.weight.copy_(torch.tensor([1.99, -3.98]).view(1, 2, 1, 1))
                out.bias.fill_(0.003)
            self.layers.append(nn.Sequential(hidden, norm, nn.ReLU(), out))

    def forward(self, x):
        x = x.sigmoid()
        for layer in self.layers:
            x = layer(x)
        return x


def test_rounding_that_a_deep_network_blows_up_is_no_fault_of_the_recording():
    net, images = Tents(40).eval(), torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = (net(images).double() - copy.deepcopy(net).double()(images.double())).abs().max()
    assert apart > 0.1  # single precision does not determine what it gives
    assert len(qs.trace(net, images).sites) == 40 + 16  # the sigmoid has lines


def test_a_fault_in_a_network_that_blows_rounding_up_is_still_found(monkeypatch):
    def wrong(module, *more):
        fold_batch_norm(module, *more)
        with torch.no_grad():
            next(module.parameters()).mul_(1.001)

    monkeypatch.setattr("quickspike.graph.fold_batch_norm", wrong)
    with pytest.raises(TraceError, match="does not compute what the network computes"):
        qs.trace(Tents(26).eval(), torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("wrapped", [False, True])
def test_no_memory_for_double_precision_is_no_fault_of_the_graph(wrapped, monkeypatch):
    def full(model, example, **more):
        if example.dtype != torch.float64:
            return capture(model, example, **more)
        try:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        except RuntimeError as error:
            if wrapped:
                raise DataError("the network cannot run on an input of shape [1]") from error
            raise

    monkeypatch.setattr("quickspike.graph.capture", full)
    with pytest.raises(DataError if wrapped else RuntimeError) as caught:
        qs.trace(Tents(40).eval(), torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert out_of_memory(caught.value)


def test_a_network_whose_answers_rounding_decides_is_refused_as_such():
    with pytest.raises(TraceError, match=r"is chaotic: its answers move by .* trained weights"):
        qs.trace(Tents(80).eval(), torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)))


class WildFarOut(nn.Module):
    """What is above `start` goes through a map that nearly doubles every difference."""

    def __init__(self, start):
        super().__init__()
        self.start, self.layer, self.norm, self.tents = start, nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), Tents(80)
        for tent in self.tents.layers:
            nn.init.zeros_(tent[-1].bias)

    def forward(self, x):
        x = self.norm(self.layer(x))
        y = torch.relu(x - self.start)
        for tent in self.tents.layers:
            y = tent(y)
        return torch.relu(x) + y


def test_noise_that_only_rounding_decides_about_is_not_what_a_network_is_proven_on(monkeypatch):
    """Far from its images a network may do what it likes; near them its graph has to be right all the same."""
    network = WildFarOut(0.8).eval()
    with torch.no_grad():
        network.layer.weight.fill_(0.7)
        network.layer.bias.fill_(0.1)
    example = torch.linspace(-1, 0.3, 16).view(1, 1, 4, 4)
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        double = copy.deepcopy(network).double()
        assert float((double(noise) - double(noise * (1 + 1e-15))).abs().max()) > 1e-2
        # Mirrored, it is larger.
        assert float(network(example).max()) < 0.5 < float(network(-example).max())
    assert len(qs.trace(network, example).sites) == 82

    def spoilt(module, sizes):
        fold_batch_norm(module, sizes)
        for node in module.graph.nodes:
            if node.op == "output":
                with module.graph.inserting_before(node):
                    node.args = (module.graph.call_function(torch.clamp, node.args, {"max": 0.5}),)
        module.recompile()

    monkeypatch.setattr("quickspike.graph.fold_batch_norm", spoilt)
    with pytest.raises(TraceError, match="does not compute what"):
        qs.trace(network, example)


def test_the_proof_in_double_precision_holds_every_layer_once(monkeypatch):
    """A network of gigabytes is to fit: folded layers take the place of those that the recording came with."""
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]
    net, held = nn.Sequential(*layers).eval(), []
    prove, where_calm = graph_module._prove, graph_module._prove_where_calm

    def fails(captured, *arguments):
        if captured.example.dtype == torch.float32:
            raise TraceError("off by more than a rounding")
        prove(captured, *arguments)

    def in_double():
        storages = {
            one.untyped_storage().data_ptr(): one.numel()
            for one in gc.get_objects()
            if type(one) is nn.Parameter and one.dtype == torch.float64
        }
        return sum(storages.values())

    def counting(*arguments):
        held.append(in_double())
        where_calm(*arguments)

    monkeypatch.setattr(graph_module, "_prove", fails)
    monkeypatch.setattr(graph_module, "_prove_where_calm", counting)
    gc.collect()
    before = in_double()
    qs.inspect(net, torch.randn(1, 16, 5, 5))
    weights = sum(layer.weight.numel() + layer.bias.numel() for layer in layers if isinstance(layer, nn.Conv2d))
    assert [one - before for one in held] == [weights]
    assert in_double() == before
