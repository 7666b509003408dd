"""What stands at a site on the ANN side, shared by methods: a probe that streams statistics, and ceilings drawn from them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from quickspike.errors import ConversionError, DataError
from quickspike.graph import Site
from quickspike.neuron import keep_positive, reduced

logger = logging.getLogger(__name__)

Granularity = Literal["channel", "layer"]

BINS = 2048
BINS_OF_A_PIECE = 256
"""An activation that is approximated has a dozen sites where ReLU has one, and steps that are coarser than these bins."""
EXACT = ("relu", "relu6", "clamp")
"""Functions that neurons compute; the others are sums of pieces."""
CANDIDATES = 256
SMALLEST_SHARE = 1e-3
"""A channel that calibration saw (almost) silent gets this share of the layer's largest ceiling, not 0."""


class StreamingHistogram:
    """Positive activations of each channel, counted in constant memory over any number of batches.

    Each channel has `bins` equal bins on [0, limit), limit a power of two that doubles when a value does not fit
    (neighbouring bins merge, so no count is lost). Zeros and negative values are counted, not binned. The error of a
    quantile is at most one bin, 2/bins of the channel's largest value.
    """

    def __init__(self, channels: int, bins: int = BINS) -> None:
        # Half the memory of whole words, until a channel has seen more values than fit.
        self.counts = torch.zeros(channels, bins, dtype=torch.int32)
        self.total = torch.zeros(channels, dtype=torch.int64)
        self.limit = torch.zeros(channels, dtype=torch.float64)
        self.maximum = torch.zeros(channels, dtype=torch.float64)

    @property
    def bins(self) -> int:
        """Number of bins of a channel."""
        return self.counts.shape[1]

    def update(self, values: Tensor) -> None:
        """Count `values`, `[C, N]`.

        Raises:
            DataError: a value is NaN or infinite.
        """
        values = values.detach()
        peak = values.amax(1).double().cpu()
        if not bool(torch.isfinite(values).all()):
            raise DataError("an activation is NaN or infinite; check the network's weights and the calibration images")
        if int(self.total.max()) + values.shape[1] > torch.iinfo(torch.int32).max:
            self.counts = self.counts.long()
        self._make_room(peak)
        channels, bins = self.counts.shape
        limit = self.limit.clamp_min(torch.finfo(torch.float64).tiny).to(values.device)
        index = (values.double() * (bins / limit)[:, None]).long().clamp_(max=bins - 1)
        index += torch.arange(channels, device=values.device)[:, None] * bins
        self.counts += torch.bincount(index[values > 0], minlength=channels * bins).view(channels, bins).cpu().to(self.counts.dtype)
        self.total += values.shape[1]
        self.maximum = torch.maximum(self.maximum, peak)

    def _make_room(self, peak: Tensor) -> None:
        fresh = (self.limit == 0) & (peak > 0)
        self.limit[fresh] = torch.exp2(torch.floor(torch.log2(peak[fresh])) + 1)
        while bool((grow := peak >= self.limit.where(self.limit > 0, torch.inf)).any()):
            merged = self.counts[grow].view(int(grow.sum()), -1, 2).sum(2, dtype=self.counts.dtype)
            self.counts[grow] = torch.cat([merged, torch.zeros_like(merged)], 1)
            self.limit[grow] *= 2

    def centres(self) -> Tensor:
        """Value that stands for each bin, `[C, bins]`, float64."""
        return (torch.arange(self.bins, dtype=torch.float64) + 0.5) * (self.limit / self.bins)[:, None]

    def percentile(self, percent: float) -> Tensor:
        """Smallest value that at least `percent` % of all values (zeros included) do not exceed, `[C]`."""
        if percent >= 100:
            return self.maximum.clone()
        needed = torch.ceil(self.total.double() * percent / 100) - (self.total - self.counts.sum(1))
        bin_index = (self.counts.cumsum(1) < needed[:, None]).sum(1)
        edge = (bin_index + 1) * self.limit / self.bins
        return torch.where(needed > 0, torch.minimum(edge, self.maximum), 0.0)

    def squared_error_ceiling(self, steps: int, initial: float) -> Tensor:
        """The ceiling of least squared error between activation z and staircase, `[C]`.

        The staircase is what a neuron with v(0) = initial * theta gives for the constant input z in T steps,
        theta/T * clip(floor(T z/theta + initial), 0, T). Candidates are `CANDIDATES` equal shares of the largest value.

        With edges e_k = (k - initial) theta/T at which the count n(z) reaches k = 1..T, the sums over all values are
        sum z n = sum_k sum_{z >= e_k} z and sum n^2 = sum_k (2k - 1) #{z >= e_k}, so that tails of the histogram
        suffice and the cost does not depend on the number of bins.
        """
        tails = self._tails()
        level = torch.arange(1, steps + 1, dtype=torch.float64)
        best = torch.zeros_like(self.maximum)
        least = torch.full_like(best, torch.inf)
        for share in torch.arange(CANDIDATES, 0, -1, dtype=torch.float64) / CANDIDATES:
            height = share * self.maximum / steps
            number, total = self._beyond((level - initial) * height[:, None], tails)
            error = height * (height * ((2 * level - 1) * number).sum(1) - 2 * total.sum(1))
            better = error < least
            best, least = torch.where(better, share * self.maximum, best), torch.where(better, error, least)
        return best

    def balanced_ceiling(self, updates: int, rate: float) -> Tensor:
        """The ceiling after `updates` gradient steps on the squared clipping error, from 0, `[C]`.

        theta <- theta + rate * mean(2 (z - theta) 1[z > theta])  (Bu et al. 2025, arXiv 2409.03368, section 4).
        """
        theta = torch.zeros_like(self.maximum)
        samples = self.total.clamp_min(1)
        tails = self._tails()
        for _ in range(updates):
            number, total = self._beyond(theta[:, None], tails)
            theta = theta + rate * 2 * ((total - theta[:, None] * number)[:, 0] / samples)
        return torch.minimum(theta, self.maximum)

    def _tails(self) -> tuple[Tensor, Tensor]:
        """Number and sum of the values in bin i and all above it, `[C, bins + 1]`, float64."""
        number = self.counts.double()
        return _tail(number), _tail(number * self.centres())

    def _beyond(self, edges: Tensor, tails: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Number and sum of the values whose bin centre is at least the edge; edges `[C, K]`, results `[C, K]`."""
        width = (self.limit / self.bins).clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        first = torch.ceil(edges / width - 0.5).clamp(0, self.bins).long()
        return tails[0].gather(1, first), tails[1].gather(1, first)


def _tail(values: Tensor) -> Tensor:
    """Sum of entry i and all after it, one column more than `values` for the empty tail."""
    before = torch.nn.functional.pad(values.cumsum(1), (1, 0))
    return before[:, -1:] - before


class CeilingProbe(nn.Module):
    """The source activation; in training mode without gradients it also streams what it gives into a histogram.

    So it watches while a network is calibrated (`ImageStream.feed`), and not while it is trained.

    Args:
        site: the activation that it replaces.
        granularity: one histogram per channel or one for the layer.
    """

    def __init__(self, site: Site, granularity: Granularity) -> None:
        super().__init__()
        self.site, self.granularity = site, granularity
        bins = BINS if site.function in EXACT else BINS_OF_A_PIECE
        self.histogram = StreamingHistogram(site.channels if granularity == "channel" else 1, bins)

    def forward(self, x: Tensor) -> Tensor:
        y = x.clamp(0.0, self.site.ceiling)
        if self.training and not torch.is_grad_enabled():
            per_channel = y.transpose(0, 1).flatten(1) if self.granularity == "channel" else y.reshape(1, -1)
            self.histogram.update(per_channel)
        return y

    def forget(self) -> None:
        """Drop what was seen, before the trained network is watched."""
        self.histogram = StreamingHistogram(*self.histogram.counts.shape)

    def finish(self, ceiling: Tensor) -> Tensor:
        """A usable threshold from a fitted ceiling: positive, and shaped to broadcast over the site.

        Raises:
            ConversionError: the probe has seen no images.
        """
        if int(self.histogram.total.max()) == 0:
            raise ConversionError(f"site {self.site.name}: no calibration images were seen before conversion")
        largest = float(ceiling.max())
        if largest <= 0:
            # A piece of another activation lies, as a rule, where few values are or none.
            level = logging.WARNING if self.site.function in EXACT else logging.DEBUG
            logger.log(level, "site %s: silent on all calibration images; its threshold is set to 1", self.site.name)
            largest = 1.0
        ceiling = ceiling.clamp_min(SMALLEST_SHARE * largest)
        return self.site.per_channel(ceiling.float()) if self.granularity == "channel" else ceiling.float().reshape(())


def probe_at(site: Site, activation: nn.Module) -> CeilingProbe:
    """The probe that a method put at `site`.

    Raises:
        ConversionError: something else stands there.
    """
    if not isinstance(activation, CeilingProbe):
        raise ConversionError(f"site {site.name}: expected a CeilingProbe, found {type(activation).__name__}")
    return activation


def mark(compare: Callable[..., Tensor], x: Tensor, bound: Tensor | float) -> Tensor:
    """1 where `compare(x, bound)` holds, 0 elsewhere, in the type of `x`.

    A boolean mask says the same, but a product of booleans and bfloat16 numbers is not vectorised on the CPU and takes
    several times as long.
    """
    return compare(x, bound, out=torch.empty_like(x))


class _Clip(torch.autograd.Function):
    """clamp(x, 0, ceiling); dL/dceiling sums the gradient of the clipped elements (arXiv 2112.12133, section 2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ceiling: Tensor) -> Tensor:
        ctx.save_for_backward(x, ceiling)
        return torch.minimum(x.clamp_min(0), ceiling.to(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        x, ceiling = ctx.saved_tensors
        (gradient,) = gradients
        above = mark(torch.gt, x, ceiling.to(x))
        to_ceiling = reduced(gradient * above, ceiling) if ctx.needs_input_grad[1] else None
        # A ceiling is positive: what is above it is above 0 too.
        return mark(torch.gt, x, 0).sub_(above).mul_(gradient), to_ceiling


def clip(x: Tensor, ceiling: Tensor) -> Tensor:
    """min(relu(x), ceiling) with gradients to both; `ceiling` is a scalar or broadcasts over `x`."""
    return cast(Tensor, _Clip.apply(x, ceiling))


class LearnedCeiling(nn.Module):
    """clamp(x, 0, mu) with a ceiling mu that is trained, one per layer or channel (TCL, arXiv 2008.04509).

    While it is in training mode without gradients it watches: a `CeilingProbe` collects the activations, from which a
    method draws the ceiling that training starts from (`start`). Until then it does not clip.

    Args:
        site: the activation that it replaces.
        granularity: one ceiling per channel or one for the layer.
    """

    def __init__(self, site: Site, granularity: Granularity) -> None:
        super().__init__()
        self.probe = CeilingProbe(site, granularity)
        self.started = False
        self.mu = nn.Parameter(site.per_channel(torch.ones(site.channels)) if granularity == "channel" else torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        watching = self.training and not torch.is_grad_enabled()
        seen = self.probe(x) if watching else x
        return self.activate(x, self.ceiling) if self.started or not watching else seen

    def activate(self, x: Tensor, ceiling: Tensor) -> Tensor:
        """The activation itself."""
        return clip(x, ceiling)

    @property
    def ceiling(self) -> Tensor:
        """mu, kept positive."""
        return keep_positive(self.mu)

    def start(self, ceiling: Tensor) -> None:
        """Set the ceilings, given `[C]` or `[1]`; from now on it clips."""
        with torch.no_grad():
            self.mu.copy_(self.probe.finish(ceiling))
        self.started = True


def ceiling_at(site: Site, activation: nn.Module) -> LearnedCeiling:
    """The learned ceiling that a method put at `site`.

    Raises:
        ConversionError: something else stands there.
    """
    if not isinstance(activation, LearnedCeiling):
        raise ConversionError(f"site {site.name}: expected a LearnedCeiling, found {type(activation).__name__}")
    return activation


class ClippedReLU(nn.Module):
    """clamp(x, 0, ceiling) with a ceiling that is fixed: what a neuron with theta = ceiling gives as T grows.

    Args:
        ceiling: scalar, or broadcastable over `[B, C, ...]`.
    """

    ceiling: Tensor

    def __init__(self, ceiling: Tensor) -> None:
        super().__init__()
        self.register_buffer("ceiling", ceiling)

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(x.clamp_min(0.0), self.ceiling.to(x))
