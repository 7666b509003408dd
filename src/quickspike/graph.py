"""trace(): from a user's network to a graph with one Site per activation call; swap(): put something else at the sites."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from quickspike.capture import Captured, Recorder, capture, measure, run_recorded, scope_of, source_of
from quickspike.classify import activate, classify
from quickspike.coverage import Coverage, Finding
from quickspike.errors import QuickspikeError, TraceError
from quickspike.memory import out_of_memory
from quickspike.operators import ReLU
from quickspike.piecewise import PIECES
from quickspike.rewrite import fold_batch_norm, move_max_pools, put_lines, remove_dropout
from quickspike.structure import Outputs, apart, each, places, tensors

ROUNDED = 2 * torch.finfo(torch.float64).eps
"""Relative difference of an input that tells whether rounding decides an answer in double precision."""
CALM = 0.01
"""Share of the tolerance that an answer may move by then: a graph rounds at every layer, not only at the input."""


@dataclass(frozen=True)
class Site:
    """One activation call of the source network: where a neuron will stand.

    A module that is called twice makes two sites.
    """

    name: str
    """Qualified name, for example `layer1.0.relu_2`; also the module's name in the traced and the spiking network."""
    function: str
    """What stood there: relu, relu6 or clamp, or the activation that this is a piece of."""
    ceiling: float | None
    """Upper bound of the source activation (6 for relu6); None for a plain ReLU."""
    shape: tuple[int, ...]
    """Of one sample, without the batch axis: (C, H, W) or (C,)."""
    source: str = ""
    """The user's line of code."""
    encodes_input: bool = False
    """True where nothing but the image itself comes in: these neurons turn pixels into spikes."""

    @property
    def channels(self) -> int:
        """Size of the axis after the batch."""
        return self.shape[0]

    def per_channel(self, values: Tensor) -> Tensor:
        """Reshape `[C]` so that it broadcasts over `[B, C, ...]`; a scalar stays a scalar."""
        return values.reshape((-1,) + (1,) * (len(self.shape) - 1)) if values.ndim else values


@dataclass(frozen=True)
class Traced:
    """A copy of the source network as a graph: batch norm folded, max-pooling in front, one named module per site."""

    module: fx.GraphModule
    sites: tuple[Site, ...]
    coverage: Coverage
    example_shape: tuple[int, ...]
    """Of one input sample, without the batch axis."""
    folded: bool = True
    """False while batch norm and dropout stand in the graph, for training."""
    choices: Mapping[str, Any] = field(default_factory=dict)
    """What the user decided about single operators, and `sizes` that the graph holds for, as plain data."""

    @property
    def name(self) -> str:
        """Class name of the source network."""
        return self.coverage.network

    def at(self, site: Site) -> nn.Module:
        """The module that stands at `site`."""
        return self.module.get_submodule(site.name)

    def copy_module(self) -> fx.GraphModule:
        """A copy of the graph and its weights; the modules at the sites are shared, since they will be replaced."""
        return copy.deepcopy(self.module, {id(self.at(site)): self.at(site) for site in self.sites})


def trace(
    model: nn.Module,
    example: Tensor,
    *,
    trainable: bool = False,
    pools_in_front: bool = True,
    analog: Sequence[str] = (),
    pieces: int = PIECES,
) -> Traced:
    """Copy `model`, record it as a graph, and find its activation sites.

    Args:
        model: the source network, any mode; it is not modified.
        example: at least one input sample, `[B, ...]`, normalised as in training.
        trainable: keep batch norm and dropout layers as they are, so that the graph can be trained; `fold` ends that.
        pools_in_front: move max-pooling in front of the activation it follows.
        analog: names (`head.*`) or operators (`LayerNorm`) of what shall be computed on real values, at every step; `*`
            and `?` stand for any text and any letter.
        pieces: straight lines that a smooth activation is approximated by, see `quickspike.piecewise`.

    Raises:
        UnsupportedOperatorError: names every operator that does not convert, with its line and the way out.
        OptionError: a pattern of `analog` fits nothing, or pieces < 2.
        TraceError: the forward pass cannot be recorded, or the recording computes something else.
        DataError: the example is unusable.
    """

    def classified(recorded: Captured) -> Coverage:
        return classify(recorded.module, recorded.sizes, recorded.name, trainable, analog, pieces)

    captured = capture(model, example)
    coverage = classified(captured)
    coverage.raise_if_unsupported()
    if not coverage.having("neuron"):
        raise TraceError(f"{captured.name} holds no activation that could become a neuron (ReLU, ReLU6, clamp at 0)")
    sites = _rewrite(captured, not trainable, pools_in_front, classified)
    choices: dict[str, Any] = {"analog": list(analog)} if analog else {}
    if any(finding.error for finding in coverage.findings):
        choices["pieces"] = pieces
    if captured.ranges:
        choices["sizes"] = [list(bounds) for bounds in captured.ranges]
    return Traced(captured.module, sites, coverage, tuple(captured.example.shape[1:]), not trainable, choices)


def fold(traced: Traced) -> Traced:
    """A copy of a trained graph with batch norm folded into the layers before it and dropout taken out."""
    module = copy.deepcopy(traced.module).eval()
    like = next(module.parameters(), torch.empty(0))
    remove_dropout(module)
    fold_batch_norm(module, measure(module, torch.zeros(1, *traced.example_shape).to(like)))
    return replace(traced, module=module, folded=True)


def inspect(model: nn.Module, example: Tensor, analog: Sequence[str] = (), pieces: int = PIECES) -> Coverage:
    """What `convert` would do with `model`: converted, analog, folded, removed, refused and why. Changes nothing.

    Raises:
        DataError: the example is unusable.
        OptionError: a pattern of `analog` fits nothing, or pieces < 2.
    """

    def classified(recorded: Captured) -> Coverage:
        return classify(recorded.module, recorded.sizes, recorded.name, analog=analog, pieces=pieces)

    name = type(model).__name__
    findings: tuple[Finding, ...] = ()
    try:
        captured = capture(model, example)
        coverage = classified(captured)
        if not coverage.convertible:
            return coverage
        findings = coverage.findings
        _rewrite(captured, True, True, classified)
    except TraceError as error:
        reason, _, way_out = str(error).partition(". Way out: ")
        return Coverage(name, (*findings, Finding("forward", name, "unsupported", reason, way_out)))
    return coverage


def _rewrite(captured: Captured, folded: bool, pools_in_front: bool, classified: Callable[[Captured], object]) -> tuple[Site, ...]:
    """Fold, move, name the sites, and prove that the graph still computes what the source network computes."""
    recorder = _arranged(captured, folded, pools_in_front)
    try:
        noise = _noise(captured.example)
        _prove(captured, recorder.result, noise, _asked(captured, noise))
    except TraceError:
        if captured.example.dtype == torch.float64:
            raise
        # A deep network can blow rounding up beyond every tolerance. In double precision it cannot, but an error stays one.
        if not _proven_in_double(captured, folded, pools_in_front, classified):
            raise
        gc.collect()
    # Approximations come in once the rest is proven right.
    if put_lines(captured.module):
        _name_sites(captured.module)
        recorder = run_recorded(captured.module, captured.example)
    weighted = _weighted(captured.module)
    return tuple(
        Site(
            str(call.target),
            call.meta["function"],
            call.meta["ceiling"],
            recorder.values[call.name][1:],
            source_of(call),
            call not in weighted,
        )
        for call in captured.module.graph.nodes
        if isinstance(_site_module(captured.module, call), ReLU)
    )


def _proven_in_double(captured: Captured, folded: bool, pools_in_front: bool, classified: Callable[[Captured], object]) -> bool:
    """Prove the same rewriting of the same network in double precision; False where it cannot compute in it.

    Raises:
        TraceError: see `_prove_where_calm`.
    """
    double = _in_double(captured)
    if double is None:
        return False
    classified(double)
    probes = [_Probe.on(double, noise) for noise in (_noise(double.example), _moved(double.example))]
    # Folding leaves each layer once only if nobody keeps those that the network came with; recordings are cycles that do.
    double = replace(double, source=nn.Module())
    gc.collect()
    _prove_where_calm(double, _arranged(double, folded, pools_in_front).result, probes)
    return True


def _arranged(captured: Captured, folded: bool, pools_in_front: bool) -> Recorder:
    """Fold, move and name the sites; what running the graph on the example gave."""
    if folded:
        fold_batch_norm(captured.module, captured.sizes)
    if pools_in_front:
        move_max_pools(captured.module)
    _name_sites(captured.module)
    recorder = run_recorded(captured.module, captured.example)
    if recorder.failed:
        raise TraceError(f"{captured.name}: the rewritten graph does not run at {recorder.failed[0]}: {recorder.failed[1]}")
    return recorder


def _asked(captured: Captured, images: Tensor) -> Outputs:
    """What the source network gives."""
    with torch.no_grad():
        given: Outputs = captured.source(images.clone())
        return given


def _prove(captured: Captured, got: Outputs, noise: Tensor, wanted: Outputs) -> None:
    """Raise TraceError unless the graph gives what the source network gives: on the example, and on noise what is `wanted`."""
    _verify(captured, captured.expected, got)
    # An example of zeros or of positive values hides what an in-place operation on an alias does.
    with torch.no_grad():
        both = captured.module(noise)
        _verify(captured, wanted, both)
        _verify_alone(captured, both, captured.module(noise[:1]))


@dataclass(frozen=True)
class _Probe:
    """Images, and what a source network gives for them."""

    images: Tensor
    answer: Outputs
    again: float
    """How far apart two calls are."""
    moved: float
    """How far answers move where the images do by a rounding."""

    @staticmethod
    def on(captured: Captured, images: Tensor) -> _Probe:
        answer = _asked(captured, images)
        again = apart(answer, _asked(captured, images))
        return _Probe(images, answer, again, apart(answer, _asked(captured, images * (1 + ROUNDED))))


def _moved(example: Tensor) -> Tensor:
    """The example mirrored in value, and moved by a pixel."""
    return torch.cat([-example[:1], example[:1].roll(1, -1)])


def _prove_where_calm(double: Captured, got: Outputs, probes: Sequence[_Probe]) -> None:
    """`_prove` on the first of the probes where rounding does not decide what the network answers.

    Raises:
        TraceError: the graph is wrong, or rounding decides everything, so that comparing says nothing.
    """
    for probe in probes:
        try:
            return _prove(double, got, probe.images, probe.answer)
        except TraceError:
            # What differs from call to call, or is no number, is no matter of rounding.
            if not probe.again == 0 or not probe.moved > CALM * _tolerance(double):
                raise
    raise TraceError(
        f"{double.name} is chaotic: its answers move by {probe.moved:.1e} of their size where its input moves by {ROUNDED:.0e} of its own, "
        "so that nothing can tell whether its graph is right. Way out: trained weights; drawn ones do this in very deep networks"
    )


def _in_double(captured: Captured) -> Captured | None:
    """The same network recorded in double precision; None where it cannot compute in it.

    Raises:
        RuntimeError, DataError: there is no memory for it, which says nothing about the network.
    """
    try:
        return capture(copy.deepcopy(captured.source).double(), captured.example.double(), copied=True)
    except (QuickspikeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        return None


def _weighted(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes that a parameter or an activation lies in front of."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        own = node.op == "get_attr" or any(True for _ in (layer.parameters() if layer is not None else ()))
        if own or any(parent in found or isinstance(_site_module(module, parent), ReLU) for parent in node.all_input_nodes):
            found.add(node)
    return found


def _site_module(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def swap(traced: Traced, maker: Callable[[Site, nn.Module], nn.Module]) -> Traced:
    """A copy of `traced` with `maker(site, module that stands there now)` at every site."""
    module = traced.copy_module()
    for site in traced.sites:
        module.set_submodule(site.name, maker(site, traced.at(site)))
    return replace(traced, module=module)


def _name_sites(module: fx.GraphModule) -> None:
    """Replace the placeholder calls of activate() by calls of named modules."""
    taken = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    for node in [node for node in module.graph.nodes if node.target is activate]:
        name = _unique(_site_name(node), taken, module)
        taken.add(name)
        _set_module(module, name, ReLU(node.meta["ceiling"]))
        with module.graph.inserting_before(node):
            call = module.graph.call_module(name, (node.args[0],))
        call.meta.update(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()


def _site_name(node: fx.Node) -> str:
    if node.meta.get("module_name"):
        return str(node.meta["module_name"])
    return ".".join(part for part in (scope_of(node), node.meta["function"]) if part)


def _unique(name: str, taken: set[str], module: fx.GraphModule) -> str:
    """`name`, or `name_2`, ... so that it hides nothing that the graph still uses."""
    candidate, number = name, 1
    while candidate in taken or _is_container(module, candidate):
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _is_container(module: fx.GraphModule, name: str) -> bool:
    try:
        present = module.get_submodule(name)
    except AttributeError:
        return _has_attribute(module, name)
    return any(True for _ in present.parameters()) or any(True for _ in present.children())


def _has_attribute(module: nn.Module, path: str) -> bool:
    """True if a dotted attribute path exists and is something other than a module."""
    owner, _, leaf = path.rpartition(".")
    try:
        return hasattr(module.get_submodule(owner), leaf)
    except AttributeError:
        return False


def _set_module(module: fx.GraphModule, name: str, new: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    parent: nn.Module = module
    for part in filter(None, owner.split(".")):
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    if leaf in parent._modules:
        parent._modules[leaf] = new
    else:
        parent.add_module(leaf, new)


def _noise(example: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((2, *example.shape[1:]), generator=generator, dtype=torch.float32).to(example)


def _verify_alone(captured: Captured, together: Outputs, alone: Outputs) -> None:
    """A sample must get the same answer alone; sizes do not show that a softmax runs over the batch."""
    for (place, two), one in zip(places(together).items(), tensors(alone), strict=True):
        if (two.shape[:1], one.shape[:1]) != ((2,), (1,)):
            raise TraceError(
                f"what {captured.name} returns{f' at {place}' if place else ''} does not follow the batch. Way out: return tensors [B, ...]"
            )
    if not apart(each(lambda both: both[:1], together), alone) <= _tolerance(captured):
        raise TraceError(
            f"{captured.name} answers differently for a sample among others than for the sample alone. "
            "Way out: keep samples apart; no softmax, norm or sort along axis 0"
        )


def _tolerance(captured: Captured) -> float:
    return 1e-3 if captured.example.dtype in (torch.float32, torch.float64) else 5e-2


def _verify(captured: Captured, expected: Outputs, got: Outputs) -> None:
    """The graph must compute what the source network computes; this catches aliasing that a recording cannot see."""
    error = apart(expected, got)
    if not error <= _tolerance(captured):
        raise TraceError(
            f"the recorded graph of {captured.name} does not compute what the network computes (relative error {error:.1e}). "
            "Usual causes: an in-place operation on a tensor that another name still refers to, randomness in forward(), "
            "or state that changes from call to call. Way out: write that step without in-place operations"
        )
