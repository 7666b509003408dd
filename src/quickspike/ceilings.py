"""Ceilings that are trained with the network: where they start, and their training, as several methods have it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quickspike.activations import LearnedCeiling, ceiling_at
from quickspike.data import ImageStream
from quickspike.graph import Site, Traced
from quickspike.training import Train, parameter_groups


def learn_ceilings(
    ann: Traced,
    images: ImageStream,
    train: Train | None,
    drawn: Callable[[Site, LearnedCeiling], Tensor],
    *,
    start: float,
    decay: float,
) -> None:
    """Start the ceilings at all sites and, if there is a training, train the network with them.

    Args:
        ann: holds a `LearnedCeiling` at every site.
        images: calibration images, which the ceilings watch.
        train: the training, if there is one.
        drawn: the ceilings `[C]` or `[1]` that follow from what was seen at a site.
        start: what a training starts from instead; 0 for what is drawn.
        decay: weight decay of the ceilings.
    """
    ceilings = {site: ceiling_at(site, ann.at(site)) for site in ann.sites}
    images.feed(ann.module, ceilings.values())
    for site, ceiling in ceilings.items():
        found = drawn(site, ceiling)
        ceiling.start(torch.full_like(found, start) if train is not None and start else found)
    if train is not None:
        learned = [ceiling.mu for ceiling in ceilings.values()]
        train(ann.module, "ann", groups=parameter_groups(ann.module, learned, weight_decay=decay))
