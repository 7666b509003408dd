"""The compiled loops of `kernels.py`. Importing this module needs numba; `kernels.py` does so on first use.

Arrays are flat views of tensors in the order of memory: `[T, N]` unsigned integers that hold the bits of float32 or
bfloat16 numbers. Parameters are arrays of one value, or of one per channel; neighbours in a channel are `inner` apart.
"""
# mypy: disable-error-code="no-untyped-def, misc"

from __future__ import annotations

import numba
import numpy as np

BLOCK = 2048
"""Neurons that a loop works on at a time: their potentials of some steps fit the first-level cache."""


@numba.njit(fastmath=False, inline="always")
def load(source, t, start, size, bits, values, half):
    """values[:size] = source[t, start : start + size] as float32; bfloat16 is the upper half of a float32."""
    if half:
        for i in range(size):
            bits[i] = np.uint32(source[t, start + i]) << np.uint32(16)
    else:
        for i in range(size):
            bits[i] = np.uint32(source[t, start + i])


@numba.njit(fastmath=False, inline="always")
def tile(parameter, start, size, inner, out):
    """out[:size] = the parameter's value for each neuron; parameters are single or per channel."""
    count = len(parameter)
    if count == 1:
        out[:size] = parameter[0]
    else:
        for i in range(size):
            out[i] = parameter[((start + i) // inner) % count]


@numba.njit(cache=True, nogil=True)
def forward(first, last, x, out, v0, theta, leak, height, inner, steps, constant, strict, half):
    """Fill blocks `first` to `last` of `out` with the spikes' heights; `height` holds their bits."""
    number = out.shape[1]
    for block in range(first, last):
        start = block * BLOCK
        size = min(BLOCK, number - start)
        bits = np.empty(BLOCK, np.uint32)
        current = bits.view(np.float32)
        v, th, lk = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
        hi = np.empty(BLOCK, np.uint32)
        tile(v0, start, size, inner, v)
        tile(theta, start, size, inner, th)
        tile(leak, start, size, inner, lk)
        tile(height, start, size, inner, hi)
        for t in range(steps):
            load(x, 0 if constant else t, start, size, bits, current, half)
            for i in range(size):
                m = current[i] + lk[i] * v[i]
                fires = m > th[i] if strict else m >= th[i]
                v[i] = m - th[i] if fires else m
                out[t, start + i] = hi[i] if fires else 0


@numba.njit(cache=True, nogil=True)
def backward(first, last, x, g, dx, v0, theta, leak, amplitude, sums, inner, steps, constant, strict, half, shape, width, scale, unscaled):
    """Fill blocks `first` to `last` of `dx` and of `sums` `[blocks, 4, K]`: gradients to theta, leak, amplitude, v0; see `neuron._Scan`."""
    number = g.shape[1]
    count = sums.shape[2]
    for block in range(first, last):
        start = block * BLOCK
        size = min(BLOCK, number - start)
        bits = np.empty(BLOCK, np.uint32)
        value = bits.view(np.float32)
        v, th, lk, am = (
            np.empty(BLOCK, np.float32),
            np.empty(BLOCK, np.float32),
            np.empty(BLOCK, np.float32),
            np.empty(BLOCK, np.float32),
        )
        before = np.empty((steps, BLOCK), np.float32)
        m = np.empty((steps, BLOCK), np.float32)
        dv, total = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
        to_theta, to_leak, to_height = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
        tile(v0, start, size, inner, v)
        tile(theta, start, size, inner, th)
        tile(leak, start, size, inner, lk)
        tile(amplitude, start, size, inner, am)
        for t in range(steps):
            load(x, 0 if constant else t, start, size, bits, value, half)
            for i in range(size):
                before[t, i] = v[i]
                m[t, i] = value[i] + lk[i] * v[i]
                fires = m[t, i] > th[i] if strict else m[t, i] >= th[i]
                v[i] = m[t, i] - th[i] if fires else m[t, i]
        for back in range(steps):
            t = steps - 1 - back
            load(g, t, start, size, bits, value, half)
            for i in range(size):
                s = np.float32(m[t, i] > th[i] if strict else m[t, i] >= th[i])
                inverse = np.float32(1.0) / th[i]
                u = abs(m[t, i] * inverse - np.float32(1.0)) / width
                slope = max(np.float32(0.0), np.float32(1.0) - u) if shape == 0 else np.float32(u < np.float32(1.0))
                e = (value[i] if unscaled else value[i] * am[i]) * scale * slope * inverse
                to_theta[i] -= e * m[t, i] * inverse + s * dv[i]
                to_height[i] += value[i] if unscaled else value[i] * s
                dm = dv[i] + e
                to_leak[i] += dm * before[t, i]
                total[i] = total[i] + dm if constant else dm
                dv[i] = lk[i] * dm
            if not constant or t == 0:
                for i in range(size):
                    value[i] = total[i]
                if half:
                    for i in range(size):
                        # Round to the nearest, ties to even, as torch does.
                        rounded = bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))
                        dx[0 if constant else t, start + i] = rounded >> np.uint32(16)
                else:
                    for i in range(size):
                        dx[0 if constant else t, start + i] = bits[i]
        for i in range(size):
            c = 0 if count == 1 else ((start + i) // inner) % count
            sums[block, 0, c] += to_theta[i]
            sums[block, 1, c] += to_leak[i]
            sums[block, 2, c] += to_height[i]
            sums[block, 3, c] += dv[i]
