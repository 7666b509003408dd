"""What tests of neurons that tell more levels apart share: converted random networks, and who refuses such neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import quickspike as qs
from quickspike.engines import accelerate
from quickspike.nir_export import to_nir

NAMES = ("chain", "residual", "concat", "pooled", "perceptron")
Networks = Callable[..., nn.Module]
Images = Callable[..., Tensor]
Converted = Callable[..., qs.SpikingNetwork]

REFUSED: dict[str, Callable[[qs.SpikingNetwork], object]] = {
    "signed": lambda snn: snn.as_signed(),
    "zero": lambda snn: snn.with_reset("zero"),
    "fold": lambda snn: snn.fold(),
    "quantise": lambda snn: qs.quantise(snn),
    "integer": lambda snn: accelerate(snn, "integer"),
    "nir": lambda snn: to_nir(snn),
}
"""What has no place for them."""


def conversions(random_network: Networks, random_images: Images, **defaults: Any) -> Converted:
    """converted(method, name, **options): made once, so copy it before changing it."""
    made: dict[Any, qs.SpikingNetwork] = {}

    def get_one(method: str = "potential_init", name: str = "chain", **options: Any) -> qs.SpikingNetwork:
        key = (method, name, *sorted(options.items()))
        if key not in made:
            made[key] = qs.convert(random_network(name), random_images(name, 16, seed=1), method, **{**defaults, **options})
        return made[key]

    return get_one
