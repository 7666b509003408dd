"""Neurons that go through the first steps twice: what the first run leaves decides how the second one goes.

Spikes that arrive unevenly make a neuron fire although it should not, or too often, or too rarely. At the end of a first
run the membrane potential tells: it is below 0 where spikes were too many, and at theta or above where they were too few.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from quickspike.conversion import SpikingNetwork
from quickspike.errors import ConversionError, OptionError
from quickspike.neuron import Neuron, NeuronParameters, Surrogate, potentials, unfold
from quickspike.readouts import AfterRehearsal, read_through

logger = logging.getLogger(__name__)

Kind = Literal["mask", "shift"]
RESIDUAL = 1e-3
"""Of theta: what a neuron must have left after the first run to be heard in the second (the published code's)."""
BEYOND = 1e-3
"""Of theta: how far a shifted potential lies beyond the threshold that it is to cross, or not (the published code's)."""


class RehearsedNeuron(Neuron):
    """Integrate-and-fire neurons with a first run.

    mask: the outputs of the first `rehearsal` steps are passed on, but count for no answer; then all potentials begin anew, and
    only neurons whose potential was above 0 are heard from there on. The T steps of the network include the first run.

    shift: the first `rehearsal` steps are simulated ahead, in each layer for itself; v(0) is lowered where a spike was too many
    and raised where one was too few; then all T steps are run. Every layer is `rehearsal` steps behind the one before.

    Args:
        parameters: see `Neuron`; neither averaged, nor signed, nor reset to 0.
        steps: T.
        constant_input: see `Neuron`.
        surrogate: see `Neuron`.
        kind: mask or shift.
        rehearsal: steps of the first run; of fewer steps than that all are.

    Raises:
        ConversionError: neurons that cannot rehearse, or no such kind.
    """

    def __init__(
        self,
        parameters: NeuronParameters,
        steps: int,
        constant_input: bool,
        surrogate: Surrogate | None = None,
        *,
        kind: Kind,
        rehearsal: int,
    ) -> None:
        super().__init__(parameters, steps, constant_input, surrogate)
        if kind not in ("mask", "shift") or type(rehearsal) is not int or rehearsal < 1:
            raise ConversionError(f"a first run is mask or shift, of 1 step or more, got {kind!r} and {rehearsal!r}")
        if self.averaged or self.signed or self.to_zero or self.weighted or self.members > 1:
            raise ConversionError("only streaming single neurons without signs that reset by subtraction have use for a first run")
        self.kind, self.rehearsal = kind, rehearsal

    @property
    def first_run(self) -> tuple[str, int]:
        return self.kind, self.rehearsal

    @property
    def waits(self) -> bool:
        return self.kind == "shift"

    @property
    def delay(self) -> int:
        # Currents that are the same at every step shift nothing.
        return min(self.rehearsal, self.steps) if self.kind == "shift" and not self.constant_input else 0

    def forward(self, x: Tensor) -> Tensor:
        return self.scan(x, None, self.steps)[0]

    def scan(self, x: Tensor, state: Any, steps: int) -> tuple[Tensor, Any]:
        if self.kind == "shift":
            self._check_whole(steps)
            return super().scan(x, (self.shifted(x), None, None), steps)
        done: int
        heard: Any
        done, potential, heard, dropped = state or (0, None, None, None)
        first = min(max(self.rehearsal - done, 0), steps)
        outputs = []
        if first:
            out, (potential, dropped, _) = super().scan(self._steps(x, 0, first, steps), (potential, dropped, None), first)
            outputs.append(out)
            if done + first == self.rehearsal:
                heard, potential = potential > RESIDUAL * self.bounded()[0], None
        if first < steps:
            out, (potential, dropped, _) = super().scan(self._steps(x, first, steps, steps), (potential, dropped, None), steps - first)
            outputs.append((unfold(out, steps - first) * heard.to(out.dtype)).flatten(0, 1))
        return torch.cat(outputs), (done + steps, potential, heard, dropped)

    def _steps(self, x: Tensor, start: int, end: int, steps: int) -> Tensor:
        """Some steps of currents that are `steps` long."""
        return x if self.constant_input else unfold(x, steps)[start:end].flatten(0, 1)

    @torch.no_grad()
    def shifted(self, x: Tensor) -> Tensor:
        """v(0) `[B, ...]` for the second run, after a first one under the currents `[T*B, ...]`.

        A neuron that fired at every step cannot do better, and keeps its potential. (The published code would let it start
        so high that it fires at all later steps, too.)
        """
        theta, leak = self.bounded()
        start = self.initial * theta
        run = min(self.rehearsal, self.steps)
        rule = self.rule(run, self.constant_input)
        least, most = theta.new_full((), math.inf), theta.new_full((), -math.inf)
        for m in potentials(self._steps(x, 0, run, self.steps), start, theta, leak, rule):
            fired = rule.fire(m, theta)
            least = torch.where(fired, m, math.inf).minimum(least)
            most = torch.where(fired, -math.inf, m).maximum(most)
        end = rule.reset(m, theta)
        too_many = (end < 0) & (least < math.inf)
        too_few = (end >= theta) & (most > -math.inf)
        lower = (least - (1 - BEYOND) * theta).maximum(theta)
        raised = ((1 + BEYOND) * theta - most).maximum(theta)
        return start - torch.where(too_many, lower, 0.0) + torch.where(too_few, raised, 0.0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind} after {self.rehearsal} steps"


def rehearse(snn: SpikingNetwork, kind: Kind, steps: int, who: str) -> None:
    """Let all neurons have a first run, in place.

    Raises:
        OptionError: some neurons cannot, or the readout leaks; `who` wants it.
    """
    if kind == "mask" and steps >= snn.steps:
        logger.warning("%s: a first run of %d steps leaves none of T = %d for the answer, and changes nothing", who, steps, snn.steps)
    if kind == "mask":
        snn.refuse_leak(f"{who}, behind which late steps count alone,")
    for name, neuron in snn.neurons().items():
        if neuron.first_run:
            raise OptionError(f"{who}: the neurons have a first run already ({name}); take one of offset_shift and residual_mask, once")
        hindrance = "waits for whole windows" if neuron.averaged or neuron.weighted else "takes spikes back" if neuron.signed else ""
        if hindrance:
            way_out = "leave synchronous, weighted and signed out"
            raise OptionError(f"{who} mends what comes of the order of spikes, but {name} {hindrance}, which mends it too; {way_out}")
        if neuron.members > 1:
            raise OptionError(f"{who} has no place for groups of neurons ({name}); convert with members=1")
        if neuron.to_zero:
            raise OptionError(f"{who} reads potentials after a reset by subtraction, but {name} resets to 0")
        values = {key: getattr(neuron, key).detach() for key in ("initial", "leak", "amplitude")}
        parameters = NeuronParameters(neuron.threshold.detach(), **values, scaled=neuron.scaled, strict=neuron.strict)
        rehearsed = RehearsedNeuron(parameters, snn.steps, neuron.constant_input, neuron.surrogate, kind=kind, rehearsal=steps)
        _replace(snn.network, name, rehearsed.train(neuron.training))
    if kind == "mask":
        read_through(snn.network, "after_rehearsal", lambda: AfterRehearsal(snn.steps, steps))
    snn.network.recompile()


def _replace(network: fx.GraphModule, name: str, layer: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(owner), leaf, layer)
