"""What the papers say their networks save, as formulas: reproduced from the papers' own figures, or filled in for another network.

They compare better with each other than with `quickspike.energy`'s conservative account: no biases, no updates of
neurons, no memory, and constants of different arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quickspike.errors import OptionError, UnknownNameError
from quickspike.operations import Operations

E_MAC = 4.6
"""Energy of a multiply-accumulate in pJ, 45 nm, 32-bit floating point (arXiv 2008.03658, result sheet)."""
E_AC = 0.9
"""Energy of an accumulate in pJ, likewise."""
E_MAC_INT32 = 3.2
"""Energy of a multiply-accumulate in pJ, 45 nm, 32-bit whole numbers (arXiv 2112.12133)."""
E_AC_INT32 = 0.1
"""Energy of an accumulate in pJ, likewise."""


def energy_ratio(first_share: float, spikes: float, e_mac: float = E_MAC, e_ac: float = E_AC) -> float:
    """Energy of the source network over that of the spiking one (arXiv 2008.03658 and 2112.12133).

    E_MAC / (E_MAC f1 + (1 - f1) E_AC R): the first layer multiplies, once for all steps; every later operation is an
    accumulate and happens R times.

    Args:
        first_share: f1, share of the first layer in the multiply-accumulates of the network, in [0, 1].
        spikes: R, mean spikes per neuron over all steps.
        e_mac: energy of a multiply-accumulate, pJ.
        e_ac: energy of an accumulate, pJ.
    """
    spent = e_mac * first_share + (1 - first_share) * e_ac * spikes
    return e_mac / spent if spent else float("inf")


def mean_spikes(rates: Sequence[float], weights: Sequence[int]) -> float:
    """Mean over layers of their spikes per neuron.

    Args:
        rates: spikes per neuron over all steps, per layer.
        weights: numbers of neurons, as arXiv 2008.03658 takes it, or multiply-accumulates that the layer's spikes drive,
            which gives the correct number of accumulates.
    """
    return sum(rate * weight for rate, weight in zip(rates, weights, strict=True)) / sum(weights)


def relative_spikes(spikes: float, reference: float) -> float:
    """Energy relative to another spiking network (arXiv 2105.11654): its spikes over the other's.

    Both are counted until the same accuracy is reached. A spike costs the same whatever it drives.

    Args:
        spikes: of all neurons, per image.
        reference: those of the other network.

    Raises:
        OptionError: the other one does not spike.
    """
    if not reference > 0:
        raise OptionError(f"relative_spikes: the network that is compared with has to spike, got {reference!r} spikes")
    return spikes / reference


def _by_neurons(operations: Operations) -> float:
    # Per neuron of the source network, whose connections the formula counts; a group stands for one of them.
    neurons = operations.total("updates") / operations.steps / operations.members
    return energy_ratio(_first_share(operations), operations.total("spikes") / neurons if neurons else 0.0)


def _by_connections(operations: Operations) -> float:
    driven = sum(row.dense for row in operations.rows if not row.multiplies)
    spikes = operations.total("accumulates") / driven if driven else 0.0
    return energy_ratio(_first_share(operations), spikes, E_MAC_INT32, E_AC_INT32)


def _first_share(operations: Operations) -> float:
    """Share of the layers that multiply."""
    total = operations.total("dense")
    return sum(row.dense for row in operations.rows if row.multiplies) / total if total else 0.0


@dataclass(frozen=True)
class Claim:
    """A saving that a paper states."""

    method: str
    published: float
    network: str
    """On which the paper states it."""
    source: str
    formula: str
    filled_in: Callable[[Operations], float] | None
    """The formula for the operations of another network; None if it takes a second network."""
    caveat: str


CLAIMS: dict[str, Claim] = {
    claim.method: claim
    for claim in (
        Claim(
            "diet_snn",
            12.0,
            "VGG-16 on ImageNet, T = 5",
            "arXiv 2008.03658, abstract",
            "E_MAC / (E_MAC f1 + (1 - f1) E_AC R), 4.6 and 0.9 pJ (fp32), R spikes per neuron weighted by neurons",
            _by_neurons,
            "early layers have many neurons with few connections each: R says little about the accumulates; spike rates are published "
            "layer by layer, and the ratios come out of them",
        ),
        Claim(
            "ultra_low_latency",
            159.2,
            "VGG-16 on CIFAR-100, T = 2",
            "arXiv 2112.12133, abstract",
            "E_MAC / (E_MAC f1 + (1 - f1) E_AC zeta), 3.2 and 0.1 pJ (int32), zeta spikes weighted by connections",
            _by_connections,
            "takes zeta = 0.034 with the first layer counted once, 0.202 without it; no zeta gives it with the first layer at both steps; "
            "we know of no published spike rates of it",
        ),
        Claim(
            "rate_norm",
            0.265,
            "against thresholds at the largest activation, both until 90 %",
            "arXiv 2105.11654, as others cite it",
            "S / S', all spikes of the network over all of the one it is held against, each counted until 90 % accuracy",
            None,
            "a spike costs the same whether it drives nine neurons or thousands; we know of no published spike "
            "counts behind 0.265: the formula is at hand (relative_spikes, which takes a second network), the figure cannot be checked",
        ),
    )
}


def claim_of(method: str) -> Claim:
    """What the paper of a method claims.

    Raises:
        UnknownNameError: it claims nothing that is known here.
    """
    if method not in CLAIMS:
        raise UnknownNameError("claim", method, tuple(CLAIMS))
    return CLAIMS[method]


def filled_in(operations: Operations) -> dict[str, float]:
    """Source network over spiking one by every formula that one network is enough for; above 1 the spiking network is cheaper."""
    return {claim.method: claim.filled_in(operations) for claim in CLAIMS.values() if claim.filled_in is not None}
