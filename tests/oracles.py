"""Closed forms and slow, obviously right references in plain Python and NumPy. Nothing of the package is imported here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def closed_form_count(z: Any, v0: Any, theta: int, t: int, strict: bool = False) -> Any:
    """Spikes up to step t under the constant integer input z, 0 <= v0 < theta; integer arithmetic only."""
    total = t * z + v0
    count = -(-total // theta) - 1 if strict else total // theta
    return np.clip(count, 0, t)


def neuron(currents: Any, theta: Any, v0: Any, leak: Any = 1, strict: bool = False) -> tuple[list[int], list[Any]]:
    """One soft-reset neuron, step by step, in whatever arithmetic the arguments bring (int, Fraction, float)."""
    spikes, potentials, v = [], [], v0
    for current in currents:
        m = leak * v + current
        fires = m > theta if strict else m >= theta
        v = m - theta if fires else m
        spikes.append(int(fires))
        potentials.append(v)
    return spikes, potentials


def smooth_step(shape: str, width: float, scale: float, u: float) -> float:
    """A function whose derivative the surrogate of that shape claims to be."""
    x = u / width
    if shape == "triangular":
        x = min(max(x, -1.0), 1.0)
        return scale * width * (x - math.copysign(x * x / 2, x))
    if shape == "boxcar":
        return scale * width * min(max(x, -1.0), 1.0)
    if shape == "arctan":
        return scale * width / math.pi * math.atan(math.pi * x)
    return scale * width / (1 + math.exp(-4 * x))


def slope_of_smooth_step(shape: str, width: float, scale: float, u: float, step: float = 1e-6) -> float:
    """Central difference of `smooth_step`."""
    return (smooth_step(shape, width, scale, u + step) - smooth_step(shape, width, scale, u - step)) / (2 * step)


def neuron_tangent(
    currents: list[float],
    theta: float,
    initial: float,
    leak: float,
    amplitude: float,
    surrogate: Any,
    d_currents: list[float],
    d_theta: float = 0.0,
    d_initial: float = 0.0,
    d_leak: float = 0.0,
    d_amplitude: float = 0.0,
) -> list[float]:
    """Directional derivative of the outputs amplitude * theta * s(t), carried forward by the product rule.

    `surrogate(u)` is used in place of the derivative of the step function at u = m/theta - 1; the reset takes the
    spike as given.
    """
    v, dv = initial * theta, d_initial * theta + initial * d_theta
    d_outputs = []
    for current, d_current in zip(currents, d_currents, strict=True):
        m = leak * v + current
        dm = d_leak * v + leak * dv + d_current
        s = 1.0 if m >= theta else 0.0
        ds = surrogate(m / theta - 1) * (dm / theta - m * d_theta / theta**2)
        v, dv = m - theta * s, dm - d_theta * s
        d_outputs.append(d_amplitude * theta * s + amplitude * d_theta * s + amplitude * theta * ds)
    return d_outputs


def spiking_mlp(layers: list[dict[str, Any]], head: dict[str, Any], image: np.ndarray, steps: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """One image through a fully connected spiking network: (logits after each step `[T, K]`, spike counts per layer).

    Each layer gives weight `[out, in]`, bias, theta, v0 and leak; spikes have height theta and neurons fire at m >= theta.
    """
    potentials = [np.full(len(layer["bias"]), 1.0) * layer["v0"] for layer in layers]
    counts = [np.zeros(len(layer["bias"]), dtype=np.int64) for layer in layers]
    total, logits = np.zeros(len(head["bias"])), []
    for t in range(1, steps + 1):
        signal = image
        for number, layer in enumerate(layers):
            m = layer["leak"] * potentials[number] + layer["weight"] @ signal + layer["bias"]
            fires = m >= layer["theta"]
            potentials[number] = np.where(fires, m - layer["theta"], m)
            counts[number] += fires
            signal = np.where(fires, layer["theta"], 0.0)
        total = total + head["weight"] @ signal + head["bias"]
        logits.append(total / t)
    return np.array(logits), counts


def max_pool_of_sums(frames: np.ndarray, size: int) -> np.ndarray:
    """`[T, H, W]` to `[T, H/size, W/size]`: at each t the largest running sum in every window."""
    steps, height, width = frames.shape
    out = np.empty((steps, height // size, width // size))
    for t in range(steps):
        total = sum(frames[: t + 1])
        for row in range(height // size):
            for column in range(width // size):
                window = total[row * size : (row + 1) * size, column * size : (column + 1) * size]
                out[t, row, column] = max(float(value) for value in window.ravel())
    return out


def percentile(values: np.ndarray, percent: float) -> float:
    """The smallest value that at least `percent` % of all values do not exceed."""
    ordered = sorted(float(value) for value in values)
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def staircase(z: np.ndarray, theta: float, steps: int, initial: float) -> np.ndarray:
    """Mean output of a neuron with v0 = initial * theta and amplitude theta under the constant input z."""
    return theta / steps * np.clip(np.floor(steps * z / theta + initial), 0, steps)


def squared_error(values: np.ndarray, theta: float, steps: int, initial: float) -> float:
    """Mean squared distance between relu(values) and the staircase."""
    z = np.maximum(values, 0)
    return float(np.mean((z - staircase(z, theta, steps, initial)) ** 2))


def least_squared_error(values: np.ndarray, steps: int, initial: float, candidates: int = 3000) -> float:
    """The least `squared_error` of any ceiling, by trying many."""
    grid = float(values.max()) * np.arange(1, candidates + 1) / candidates
    return min(squared_error(values, float(theta), steps, initial) for theta in grid)


def balanced_ceilings(values: np.ndarray, updates: int, rate: float) -> list[float]:
    """theta after each update theta <- theta + rate * mean(2 (z - theta) 1[z > theta]), from 0."""
    theta, course = 0.0, []
    for _ in range(updates):
        theta += rate * float(np.mean(np.where(values > theta, 2 * (values - theta), 0.0)))
        course.append(theta)
    return course


def slope(steps: list[int], errors: list[float]) -> float:
    """Least-squares slope of log error over log steps."""
    x, y = np.log(steps), np.log(errors)
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())
