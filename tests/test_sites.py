"""Options that hold at some sites only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quickspike as qs
from quickspike.errors import OptionError
from quickspike.method import Method, create, get
from quickspike.methods.threshold_balancing import ThresholdBalancing
from quickspike.options import parsed


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 4)
    )


def images() -> Tensor:
    return torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def thresholds(**options: Any) -> dict[str, Tensor]:
    snn = qs.convert(network(), images(), steps=4, **options)
    return {name: neuron.threshold.detach() for name, neuron in snn.neurons().items()}


def test_only_the_sites_that_fit_differ() -> None:
    plain = thresholds()
    changed = thresholds(sites={"[13]": {"scale": 0.5}, "3": {"granularity": "layer"}})
    assert torch.allclose(changed["1"], 0.5 * plain["1"])
    assert changed["3"].ndim == 0
    # Both patterns fit the second site.
    assert torch.allclose(changed["3"], 0.5 * thresholds(granularity="layer")["3"])
    assert torch.equal(changed["6"], plain["6"])


def test_every_declared_option_takes_effect_where_it_is_asked_for_and_nowhere_else() -> None:
    others: dict[str, Any] = {
        **{"ceiling": "percentile", "granularity": "layer", "scale": 0.7, "initial": 0.1, "synchronous": True, "signed": True},
        **{"percentile": 50.0, "updates": 3, "rate": 0.2, "fit_steps": 32},
    }
    needs = {"percentile": {"ceiling": "percentile"}, "updates": {"ceiling": "balanced"}, "rate": {"ceiling": "balanced", "updates": 20}}
    assert set(others) == set(ThresholdBalancing.per_site)

    def neurons(**options: Any) -> dict[str, tuple[Any, ...]]:
        snn = qs.convert(network(), images(), steps=4, **options)
        return {name: (one.threshold.tolist(), one.initial.tolist(), one.averaged, one.signed) for name, one in snn.neurons().items()}

    for name, value in others.items():
        base = needs.get(name, {})
        plain, there, everywhere = neurons(**base), neurons(**base, sites={"3": {name: value}}), neurons(**(base | {name: value}))
        assert there["3"] == everywhere["3"] != plain["3"], name
        assert (there["1"], there["6"]) == (plain["1"], plain["6"]), name


def test_a_mixed_network_says_how_long_it_takes() -> None:
    snn = qs.convert(network(), images(), steps=4, sites={"3": {"synchronous": True}})
    assert snn.latency == 8
    assert [neuron.averaged for neuron in snn.neurons().values()] == [False, True, False]


def test_it_is_kept_with_the_network(tmp_path: Any) -> None:
    snn = qs.convert(network(), images(), steps=4, sites={"3": {"scale": 0.5}})
    snn.save(tmp_path / "network.safetensors")
    loaded = qs.load(tmp_path / "network.safetensors")
    assert Method.from_json(loaded.method) == create("threshold_balancing", steps=4, sites={"3": {"scale": 0.5}})
    assert "sites" not in create("threshold_balancing").to_json()["options"]


@pytest.mark.parametrize(
    ("sites", "text"),
    [
        ({"4": {"scale": 0.5}}, "'4' fits no site; sites: 1, 3, 6"),
        ({"3": {"steps": 2}}, "steps cannot differ from site to site.*these can: synchronous, signed, ceiling"),
        ({"3": {"scael": 0.5}}, "scael cannot differ"),
        ({"3": {"scale": 5.0}}, "scale must be in range"),
        ({"3": 0.5}, "sites must be options by pattern"),
        (["3"], "sites must be options by pattern"),
    ],
)
def test_mistakes_are_refused(sites: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        thresholds(sites=sites)


def test_options_are_read_from_text() -> None:
    method = get("threshold_balancing")
    assert parsed(method, "scale", "0.5") == 0.5
    assert parsed(method, "granularity", "layer") == "layer"
    assert parsed(method, "synchronous", "true") is True
    assert parsed(method, "updates", "7") == 7
    for name, text, reason in (
        ("scale", "half", "scale must be a number, got 'half'"),
        ("granularity", "row", "one of channel, layer"),
        ("synchronous", "1", "one of true, false"),
        ("updates", "1.5", "a whole number"),
        ("scael", "1", "no option 'scael'; options: steps"),
    ):
        with pytest.raises(OptionError, match=reason):
            parsed(method, name, text)
