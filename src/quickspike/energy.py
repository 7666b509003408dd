"""Energy of a spiking network and of its source: counted operations times a device's constants, each with its source.

Three accounts. `papers`: multiply-accumulates and accumulates alone, as the papers do. `conservative`: also biases, leaks,
the update of every neuron at every step and the subtraction at every reset. `memory`: also every operand's way from and to
a small memory, none of them kept in a register but the sum of a multiply-accumulate. None knows of routing of spikes or
idle power: compare accounts of one device, not watts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from quickspike.errors import OptionError, UnknownNameError
from quickspike.operations import Operations

Account = Literal["papers", "conservative", "memory"]
ACCOUNTS: tuple[Account, ...] = ("papers", "conservative", "memory")


@dataclass(frozen=True)
class Device:
    """What operations cost, in pJ."""

    name: str
    add: float
    """An addition: one accumulate."""
    multiply: float | None
    """A multiplication; None for a chip that has none: layers that read real values then run elsewhere, at the cost of `45nm_fp32`."""
    source: str
    """Where the figures are published."""
    update: float | None = None
    """Update of a neuron in a step, where the device has a figure of its own; None: an addition."""
    access: float | None = None
    """Reading or writing an operand; None: no figure, or the others are measured with memory."""

    def __post_init__(self) -> None:
        for name in ("add", "multiply", "update", "access"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise OptionError(f"device {self.name}: {name} must be a number of pJ >= 0, got {value!r}")

    @property
    def mac(self) -> float | None:
        """A multiply-accumulate."""
        return None if self.multiply is None else self.multiply + self.add


_HOROWITZ = "M. Horowitz, Computing's Energy Problem, ISSCC 2014, 45 nm"
_CACHE = 20 / 64
"""Of a bit from a cache of 32 KiB, in pJ (ibid.)."""
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("45nm_fp32", add=0.9, multiply=3.7, access=32 * _CACHE, source=f"{_HOROWITZ}; used by arXiv 2008.03658"),
        Device("45nm_fp16", add=0.4, multiply=1.1, access=16 * _CACHE, source=_HOROWITZ),
        Device("45nm_int32", add=0.1, multiply=3.1, access=32 * _CACHE, source=f"{_HOROWITZ}; used by arXiv 2112.12133"),
        Device("45nm_int8", add=0.03, multiply=0.2, access=8 * _CACHE, source=_HOROWITZ),
        Device("loihi", add=23.6, multiply=None, update=81.0, source="M. Davies et al., Loihi, IEEE Micro 38 (2018), table 2, 14 nm"),
        Device("truenorth", add=26.0, multiply=None, update=0.0, source="P. Merolla et al., Science 345 (2014), 28 nm, all included"),
    )
}


def register_device(device: Device) -> None:
    """Make a device of one's own known by its name; an existing one is replaced."""
    DEVICES[device.name] = device


def device_named(name: str) -> Device:
    """A device by its name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in DEVICES:
        raise UnknownNameError("device", name, tuple(DEVICES))
    return DEVICES[name]


@dataclass(frozen=True)
class Energy:
    """Energy of one image, in pJ."""

    device: str
    account: Account
    spiking: float
    source: float
    """Of the source network."""
    parts: dict[str, float]
    """What `spiking` consists of."""
    caveats: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Source network over spiking one: above 1 the spiking network is cheaper."""
        return self.source / self.spiking if self.spiking else float("inf")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "ratio": self.ratio if self.spiking else None}


def energy_of(operations: Operations, device: str | Device = "45nm_fp32", account: Account = "conservative") -> Energy:
    """Energy of the counted operations, and of the source network on the same device.

    Args:
        operations: see `quickspike.operations.count_operations`.
        device: one of `DEVICES`, or one's own.
        account: see the module.

    Raises:
        UnknownNameError: no such device.
        OptionError: no such account.
    """
    if account not in ACCOUNTS:
        raise OptionError(f"account must be {', '.join(ACCOUNTS[:-1])} or {ACCOUNTS[-1]}, got {account!r}")
    if isinstance(device, str):
        device = device_named(device)
    analog = device if device.multiply is not None else DEVICES["45nm_fp32"]
    mac, multiply = analog.mac or 0.0, analog.multiply or 0.0
    total = operations.total
    parts = {"multiply-accumulates": mac * total("multiplies"), "accumulates": device.add * total("accumulates")}
    source = mac * total("dense")
    if account != "papers":
        parts |= {
            "biases": device.add * total("biases"),
            "leaks": multiply * total("leaks") if device.update is None else 0.0,
            "updates": (device.add if device.update is None else device.update) * total("updates"),
            "resets": device.add * total("spikes") if device.update is None else 0.0,
        }
        source += analog.add * total("source_biases")
    if account == "memory" and device.access is not None:
        # A multiply-accumulate reads weight and value; an accumulate reads weight and potential and writes it, an update the latter two.
        words = 2 * total("multiplies") + 3 * total("accumulates") + 2 * total("updates")
        parts["memory"] = device.access * words
        source += device.access * 2 * total("dense")
    return Energy(device.name, account, sum(parts.values()), source, parts, _caveats(operations, device, account))


def _caveats(operations: Operations, device: Device, account: Account) -> tuple[str, ...]:
    traffic = "" if account == "memory" or device.access is None else "memory traffic, "
    found = [f"{traffic}routing of spikes and idle power are not counted", "average pooling is folded into the layer behind it"]
    if account == "memory" and device.access is not None:
        found.append("memory: every operand comes from a cache of 32 KiB, nothing is reused")
    if device.access is None:
        found.append(f"{device.name} has no figure of memory apart from the others: the account memory adds nothing")
    if operations.total("multiplies"):
        often = "once" if operations.first == "once" else f"at each of {operations.steps} steps"
        found.append(f"layers that read the image multiply, {often}")
    if operations.weighted:
        found.append("spikes are weighted by their step: a neuron shifts what it has once a step, which costs nothing here")
    if operations.members > 1:
        found.append(
            f"groups of {operations.members}: each member's potential is updated at every step; they share one sum of currents, and "
            f"would take up to {operations.members} times the accumulates with synapses of their own"
        )
    if device.multiply is None:
        found.append(f"{device.name} does not multiply: layers that read real values, and the source network, cost as on 45nm_fp32")
    if account == "papers":
        found.append("biases, leaks, updates and resets of neurons cost nothing in this account")
    return tuple(found)
