"""Energy of a spiking network relative to its source, by the formulas of the papers; every constant with its source."""

from __future__ import annotations

from collections.abc import Sequence

E_MAC = 4.6
"""Energy of a multiply-accumulate in pJ, 45 nm, 32-bit floating point (arXiv 2008.03658, result sheet)."""
E_AC = 0.9
"""Energy of an accumulate in pJ, likewise."""


def energy_ratio(first_share: float, spikes: float, e_mac: float = E_MAC, e_ac: float = E_AC) -> float:
    """Energy of the source network over that of the spiking one (arXiv 2008.03658).

    E_MAC / (E_MAC f1 + (1 - f1) E_AC R): the first layer multiplies, once for all steps; every later operation is an
    accumulate and happens R times.

    Args:
        first_share: f1, share of the first layer in the multiply-accumulates of the network, in [0, 1].
        spikes: R, mean spikes per neuron over all steps.
        e_mac: energy of a multiply-accumulate, pJ.
        e_ac: energy of an accumulate, pJ.
    """
    return e_mac / (e_mac * first_share + (1 - first_share) * e_ac * spikes)


def mean_spikes(rates: Sequence[float], weights: Sequence[int]) -> float:
    """Mean over layers of their spikes per neuron.

    Args:
        rates: spikes per neuron over all steps, per layer.
        weights: numbers of neurons, as the papers take it, or multiply-accumulates that the layer's spikes drive, which
            gives the correct number of accumulates.
    """
    return sum(rate * weight for rate, weight in zip(rates, weights, strict=True)) / sum(weights)
