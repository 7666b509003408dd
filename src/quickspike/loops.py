"""The compiled loops of `kernels.py`. Importing this module needs numba; `kernels.py` does so on first use.

Arrays are flat views of tensors in the order of memory: `[T, N]` unsigned integers that hold the bits of float32 or
bfloat16 numbers. Parameters are arrays of one value, or of one per channel; neighbours in a channel are `inner` apart.
"""
# mypy: disable-error-code="no-untyped-def, misc"

from __future__ import annotations

import numba
import numpy as np

BLOCK = 512
"""Neurons that a loop works on at a time: their potentials of some steps fit the first-level cache."""


# Every inner loop writes one array and reads few: the compiler turns only such loops into vector instructions, since it
# has to check at run time that arrays do not overlap, and gives up beyond some pairs. For the same reason nothing else
# is checked (division by zero: error_model; negative indices: slices), flags are decided outside the loops, and
# "strictly above theta" is "at least the next number above theta".
_inline = numba.njit(inline="always", error_model="numpy")
_compile = numba.njit(cache=True, nogil=True, error_model="numpy")


@_inline
def load(source, t, start, size, bits, half):
    """bits[:size] = source[t, start : start + size] as float32; bfloat16 is the upper half of a float32."""
    row = source[t, start : start + size]
    if half:
        for i in range(size):
            bits[i] = np.uint32(row[i]) << np.uint32(16)
    else:
        for i in range(size):
            bits[i] = np.uint32(row[i])


@_inline
def tile(parameter, start, size, inner, out):
    """out[:size] = the parameter's value for each neuron; parameters are single or per channel."""
    count = len(parameter)
    if count == 1:
        value = parameter[0]
        for i in range(size):
            out[i] = value
    else:
        for i in range(size):
            out[i] = parameter[((start + i) // inner) % count]


@_inline
def integrate(current, leak, v, size, m):
    """M = current + leak v."""
    for i in range(size):
        m[i] = current[i] + leak[i] * v[i]


@_inline
def reset(m, fires_at, theta, size, v):
    """V = m - theta where m reaches the firing level, else m."""
    for i in range(size):
        v[i] = m[i] - (theta[i] if m[i] >= fires_at[i] else np.float32(0.0))


@_compile
def forward(first, last, x, out, v0, theta, fires_at, leak, height, inner, steps, constant, half):
    """Fill blocks `first` to `last` of `out` with the spikes' heights; `height` holds their bits."""
    number = out.shape[1]
    bits, high = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    current = bits.view(np.float32)
    v, m = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    th, fa, lk = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for block in range(first, last):
        start = block * BLOCK
        size = min(BLOCK, number - start)
        tile(v0, start, size, inner, v)
        tile(theta, start, size, inner, th)
        tile(fires_at, start, size, inner, fa)
        tile(leak, start, size, inner, lk)
        tile(height, start, size, inner, high)
        for t in range(steps):
            load(x, 0 if constant else t, start, size, bits, half)
            integrate(current, lk, v, size, m)
            reset(m, fa, th, size, v)
            row = out[t, start : start + size]
            for i in range(size):
                row[i] = high[i] if m[i] >= fa[i] else np.uint32(0)


@_inline
def slopes(m, inverse, width, shape, size, h):
    """H = derivative of the step at u = m/theta - 1, peak 1; `width` is the inverse width."""
    if shape == 0:
        for i in range(size):
            rest = np.float32(1.0) - abs(m[i] * inverse[i] - np.float32(1.0)) * width
            h[i] = rest if rest > np.float32(0.0) else np.float32(0.0)
    else:
        for i in range(size):
            h[i] = np.float32(1.0) if abs(m[i] * inverse[i] - np.float32(1.0)) * width < np.float32(1.0) else np.float32(0.0)


@_inline
def store(values, bits, t, start, size, half, out):
    """out[t, start : start + size] = values; to bfloat16 it is rounded to the nearest, ties to even, as torch does."""
    row = out[t, start : start + size]
    if half:
        for i in range(size):
            row[i] = (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    else:
        for i in range(size):
            row[i] = bits[i]


@numba.njit(fastmath={"reassoc"}, error_model="numpy")
def add_up(values, start, size, inner, sums):
    """Add the values of each channel to its sum; the order is the compiler's, and always the same."""
    count = len(sums)
    if count == 1:
        total = np.float32(0.0)
        for i in range(size):
            total += values[i]
        sums[0] += total
    else:
        for i in range(size):
            sums[((start + i) // inner) % count] += values[i]


@_compile
def backward(
    first, last, x, g, dx, v0, theta, fires_at, leak, amplitude, sums, inner, steps, constant, half, shape, width, scale, unscaled
):
    """Fill blocks `first` to `last` of `dx` and of `sums` `[blocks, 4, K]`: gradients to theta, leak, amplitude, v0.

    See `neuron._Scan`; `width` is the inverse of the surrogate's.
    """
    number = g.shape[1]
    bits = np.empty(BLOCK, np.uint32)
    value = bits.view(np.float32)
    out_bits = np.empty(BLOCK, np.uint32)
    total = out_bits.view(np.float32)
    th, fa, lk = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    inverse, factor, v = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    e, dv, dm = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    to_theta, to_leak, to_height = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    before, potentials = np.empty((steps, BLOCK), np.float32), np.empty((steps, BLOCK), np.float32)
    for block in range(first, last):
        start = block * BLOCK
        size = min(BLOCK, number - start)
        tile(v0, start, size, inner, v)
        tile(theta, start, size, inner, th)
        tile(fires_at, start, size, inner, fa)
        tile(leak, start, size, inner, lk)
        tile(amplitude, start, size, inner, factor)
        for i in range(size):
            inverse[i] = np.float32(1.0) / th[i]
        for i in range(size):
            factor[i] = (np.float32(1.0) if unscaled else factor[i]) * scale * inverse[i]
        to_theta[:], to_leak[:], to_height[:], dv[:], total[:] = 0, 0, 0, 0, 0
        for t in range(steps):
            load(x, 0 if constant else t, start, size, bits, half)
            before[t, :size] = v[:size]
            integrate(value, lk, v, size, potentials[t])
            reset(potentials[t], fa, th, size, v)
        for back in range(steps):
            t = steps - 1 - back
            m = potentials[t]
            load(g, t, start, size, bits, half)
            slopes(m, inverse, width, shape, size, e)
            for i in range(size):
                e[i] = e[i] * value[i] * factor[i]
            for i in range(size):
                to_theta[i] = to_theta[i] - e[i] * m[i] * inverse[i]
            for i in range(size):
                to_theta[i] = to_theta[i] - (dv[i] if m[i] >= fa[i] else np.float32(0.0))
            if unscaled:
                for i in range(size):
                    to_height[i] = to_height[i] + value[i]
            else:
                for i in range(size):
                    to_height[i] = to_height[i] + (value[i] if m[i] >= fa[i] else np.float32(0.0))
            for i in range(size):
                dm[i] = dv[i] + e[i]
            earlier = before[t]
            for i in range(size):
                to_leak[i] = to_leak[i] + dm[i] * earlier[i]
            for i in range(size):
                dv[i] = lk[i] * dm[i]
            if constant:
                for i in range(size):
                    total[i] = total[i] + dm[i]
            else:
                for i in range(size):
                    total[i] = dm[i]
            if not constant or t == 0:
                store(total, out_bits, 0 if constant else t, start, size, half, dx)
        add_up(to_theta, start, size, inner, sums[block, 0])
        add_up(to_leak, start, size, inner, sums[block, 1])
        add_up(to_height, start, size, inner, sums[block, 2])
        add_up(dv, start, size, inner, sums[block, 3])
