"""The compiled loops of `kernels.py`. Importing this module needs numba; `kernels.py` does so on first use.

Arrays are flat views of tensors in the order of memory: `[T, N]` unsigned integers that hold the bits of float32 or
bfloat16 numbers. Parameters are arrays of one value, or of one per channel; neighbours in a channel are `inner` apart.
"""
# mypy: disable-error-code="no-untyped-def, misc"

from __future__ import annotations

import numba
import numpy as np

BLOCK = 512
"""Neurons that a loop works on at a time, at most: their potentials of some steps fit the first-level cache."""
GROUP = 16
"""Blocks that share one row of sums, and go to one thread."""


# Every inner loop writes one array and reads few: the compiler turns only such loops into vector instructions, since it
# has to check at run time that arrays do not overlap, and gives up beyond some pairs. For the same reason nothing else
# is checked (division by zero: error_model; negative indices: slices), flags are decided outside the loops, and
# "strictly above theta" is "at least the next number above theta".
_inline = numba.njit(inline="always", error_model="numpy")
_apart = numba.njit(error_model="numpy")
_compile = numba.njit(cache=True, nogil=True, error_model="numpy")


def block_length(channels: int, inner: int) -> int:
    """Neurons of a block: where neighbours are of different channels, every block begins at the first one if it can."""
    return BLOCK // channels * channels if inner == 1 and channels <= BLOCK else BLOCK


@_inline
def phase_of(start, inner, channels):
    """What the parameters of a block depend on: blocks of one phase have the same."""
    if inner == 1 or channels == 1:
        return start % channels
    return start


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
    # A division for each neuron would cost more than all the rest: go from one run of channels, or of neurons of one
    # channel, to the next.
    if count == 1:
        out[:size] = parameter[0]
    elif inner == 1:
        channel = start % count
        done = min(count - channel, size)
        out[:done] = parameter[channel : channel + done]
        left = min(channel, size - done)
        out[done : done + left] = parameter[:left]
        done += left
        while done < size:  # the rest repeats what is there
            run = min(done, size - done)
            out[done : done + run] = out[:run]
            done += run
    else:
        done = 0
        channel = (start // inner) % count
        left = inner - start % inner
        while done < size:
            run = min(left, size - done)
            out[done : done + run] = parameter[channel]
            done, channel, left = done + run, (channel + 1) % count, inner


@_inline
def tile_all(v0, theta, fires_at, leak, start, size, inner, begin, th, fa, lk):
    """`tile` for the parameters that every loop reads."""
    tile(v0, start, size, inner, begin)
    tile(theta, start, size, inner, th)
    tile(fires_at, start, size, inner, fa)
    tile(leak, start, size, inner, lk)


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
def forward(first, last, x, out, state, resume, v0, theta, fires_at, leak, height, channels, inner, length, steps, constant, half):
    """Fill groups `first` to `last` of `out` with the spikes' heights; `height` holds their bits.

    `state` `[N]`, if it has room, takes the potentials after the last step; with `resume` they begin as it holds them.
    """
    number = out.shape[1]
    bits, high = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    current = bits.view(np.float32)
    v, m, begin = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    th, fa, lk = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    tiled = -1
    for start in range(first * GROUP * length, min(last * GROUP * length, number), length):
        size = min(length, number - start)
        phase = phase_of(start, inner, channels)
        if phase != tiled:
            tile_all(v0, theta, fires_at, leak, start, length, inner, begin, th, fa, lk)
            tile(height, start, length, inner, high)
            tiled = phase
        if resume:
            v[:size] = state[start : start + size]
        else:
            v[:] = begin
        for t in range(steps):
            load(x, 0 if constant else t, start, size, bits, half)
            integrate(current, lk, v, size, m)
            reset(m, fa, th, size, v)
            row = out[t, start : start + size]
            for i in range(size):
                row[i] = high[i] if m[i] >= fa[i] else np.uint32(0)
        if len(state):
            state[start : start + size] = v[:size]


@_compile
def forward_signed(first, last, x, out, state, left, theta, fires_at, leak, up, down, channels, inner, length, steps, constant, half):
    """`forward` of neurons that take spikes back; `up` and `down` hold the bits of the heights of 1 and -1.

    `state` and `left` `[N]` hold the potentials and the spikes that can be taken back, before the first step and after the last.
    """
    number = out.shape[1]
    bits, high, low = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    current = bits.view(np.float32)
    v, m = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    th, fa, lk = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    fired, rest = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    tiled = -1
    for start in range(first * GROUP * length, min(last * GROUP * length, number), length):
        size = min(length, number - start)
        phase = phase_of(start, inner, channels)
        if phase != tiled:
            tile(theta, start, length, inner, th)
            tile(fires_at, start, length, inner, fa)
            tile(leak, start, length, inner, lk)
            tile(up, start, length, inner, high)
            tile(down, start, length, inner, low)
            tiled = phase
        v[:size] = state[start : start + size]
        rest[:size] = left[start : start + size]
        for t in range(steps):
            load(x, 0 if constant else t, start, size, bits, half)
            integrate(current, lk, v, size, m)
            for i in range(size):
                back = np.float32(1.0) if (m[i] < np.float32(0.0)) & (rest[i] > np.float32(0.0)) else np.float32(0.0)
                fired[i] = (np.float32(1.0) if m[i] >= fa[i] else np.float32(0.0)) - back
            for i in range(size):
                v[i] = m[i] - th[i] * fired[i]
            for i in range(size):
                rest[i] = rest[i] + fired[i]
            row = out[t, start : start + size]
            for i in range(size):
                row[i] = high[i] if fired[i] > np.float32(0.0) else (low[i] if fired[i] < np.float32(0.0) else np.uint32(0))
        state[start : start + size] = v[:size]
        left[start : start + size] = rest[:size]


@_apart
def count_directly(current, begin, inverse, size, steps, m, counts):
    """counts[:size] = clip(floor((v0 + T current)/theta), 0, T); True if every one is that of the steps, too.

    The potential after the last step differs from the one without rounding by at most 3 roundings of 2 theta at every step,
    and m from the exact quotient by 4 of itself: what is further than 1e-6 (T + 1) from a whole number is on its right side.
    A spike that rounding delays on the way is fired a step later, since none is due then, unless the end is near a whole number.
    """
    most, margin = np.float32(steps), np.float32(1e-6) * np.float32(steps + 1)
    for i in range(size):
        quotient = (begin[i] + current[i] * most) * inverse[i]
        m[i] = min(max(quotient, np.float32(-0.5)), most + np.float32(0.5))
    close = np.int32(0)
    for i in range(size):
        # The other way round NaN would count as far from everything.
        close += np.int32(0) if abs(m[i] - np.rint(m[i])) > margin else np.int32(1)
    for i in range(size):
        counts[i] = np.int32(min(max(m[i], np.float32(0.0)), most))
    return close == 0


@_apart
def count_whole(current, begin, th, inverse, size, steps, m, counts):
    """The same where thresholds are whole numbers and 1/steps has no rounding; False if T current is not whole, or too large.

    No step rounds then, so that the multiple of theta which v0 + T current reaches is found by one exact comparison.
    """
    most, large = np.float32(steps), np.float32(2**23 // steps)
    for i in range(size):
        m[i] = begin[i] + current[i] * most
    others = np.int32(0)
    for i in range(size):
        others += np.int32(0) if (m[i] == np.rint(m[i])) & (abs(m[i]) < large) else np.int32(1)
    if others:
        return False
    for i in range(size):
        near = np.rint(min(max(m[i] * inverse[i], np.float32(-0.5)), most + np.float32(0.5)))
        reached = near if m[i] >= near * th[i] else near - np.float32(1.0)
        counts[i] = np.int32(min(max(reached, np.float32(0.0)), most))
    return True


@_compile
def count(first, last, x, out, v0, theta, fires_at, leak, channels, inner, length, steps, divisor, half, direct, whole):
    """Fill groups `first` to `last` of `out` with the number of spikes under the constant current x/divisor.

    With `direct` (no leak, 0 <= v0 < theta) the work does not depend on the number of steps, but for blocks in which a
    potential ends so near a multiple of theta that only the steps themselves tell on which side; with `whole`, see
    `count_whole`, these are as quick where currents are whole numbers.
    """
    number = out.shape[1]
    bits = np.empty(BLOCK, np.uint32)
    current = bits.view(np.float32)
    v, m, begin = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    th, fa, lk = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    inverse = np.empty(BLOCK, np.float32)
    counts = np.empty(BLOCK, np.int32)
    tiled = -1
    for start in range(first * GROUP * length, min(last * GROUP * length, number), length):
        size = min(length, number - start)
        phase = phase_of(start, inner, channels)
        if phase != tiled:
            tile_all(v0, theta, fires_at, leak, start, length, inner, begin, th, fa, lk)
            for i in range(length):
                inverse[i] = np.float32(1.0) / th[i]
            tiled = phase
        load(x, 0, start, size, bits, half)
        for i in range(size):
            current[i] = current[i] / divisor
        done = direct and count_directly(current, begin, inverse, size, steps, m, counts)
        if not done and whole:
            done = count_whole(current, begin, th, inverse, size, steps, m, counts)
        if not done:
            v[:] = begin
            counts[:] = 0
            for _ in range(steps):
                integrate(current, lk, v, size, m)
                reset(m, fa, th, size, v)
                for i in range(size):
                    counts[i] += np.int32(1) if m[i] >= fa[i] else np.int32(0)
        row = out[0, start : start + size]
        for i in range(size):
            row[i] = counts[i]


@_inline
def errors(g, m, inverse, factor, width, shape, size, e):
    """E = g h'(u) factor, where u = m/theta - 1 and h' has peak 1; `width` is the inverse width."""
    if shape == 0:
        for i in range(size):
            rest = np.float32(1.0) - abs(m[i] * inverse[i] - np.float32(1.0)) * width
            e[i] = (rest if rest > np.float32(0.0) else np.float32(0.0)) * g[i] * factor[i]
    else:
        for i in range(size):
            near = abs(m[i] * inverse[i] - np.float32(1.0)) * width < np.float32(1.0)
            e[i] = (np.float32(1.0) if near else np.float32(0.0)) * g[i] * factor[i]


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
def total_of(values):
    """Their sum; the order is the compiler's, and always the same."""
    total = np.float32(0.0)
    for i in range(len(values)):
        total += values[i]
    return total


@_inline
def add_up(values, start, size, inner, sums):
    """Add the values of each channel to its sum, and set them to 0."""
    count = len(sums)
    if count == 1:
        sums[0] += total_of(values[:size])
        values[:] = 0
        return
    done = 0
    channel = (start // inner) % count
    if inner == 1:
        while done < size:
            run = min(count - channel, size - done)
            for i in range(run):
                sums[channel + i] += values[done + i]
            done, channel = done + run, 0
    else:
        left = inner - start % inner
        while done < size:
            run = min(left, size - done)
            sums[channel] += total_of(values[done : done + run])
            done, channel, left = done + run, (channel + 1) % count, inner
    values[:] = 0


@_inline
def add_all(to_theta, to_leak, to_height, to_begin, start, size, inner, sums):
    """`add_up` for the rows of `sums` `[4, K]`."""
    add_up(to_theta, start, size, inner, sums[0])
    add_up(to_leak, start, size, inner, sums[1])
    add_up(to_height, start, size, inner, sums[2])
    add_up(to_begin, start, size, inner, sums[3])


@_compile
def backward(
    first,
    last,
    x,
    g,
    dx,
    v0,
    theta,
    fires_at,
    leak,
    amplitude,
    sums,
    inner,
    length,
    steps,
    constant,
    half,
    shape,
    width,
    scale,
    unscaled,
):
    """Fill groups `first` to `last` of `dx` and of `sums` `[groups, 4, K]`: gradients to theta, leak, amplitude, v0.

    See `neuron._Scan`; `width` is the inverse of the surrogate's.
    """
    number, channels = g.shape[1], sums.shape[2]
    bits = np.empty(BLOCK, np.uint32)
    value = bits.view(np.float32)
    out_bits = np.empty(BLOCK, np.uint32)
    total = out_bits.view(np.float32)
    begin, th, fa, lk = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    inverse, factor = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    e, dv = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    to_theta, to_leak = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    to_height, to_begin = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    # Row t of `rests` is the potential that step t begins with, row t of `potentials` the one before its reset.
    rests, potentials = np.empty((steps + 1, BLOCK), np.float32), np.empty((steps, BLOCK), np.float32)
    for group in range(first, last):
        tiled, tiled_at = -1, 0
        for start in range(group * GROUP * length, min((group + 1) * GROUP * length, number), length):
            size = min(length, number - start)
            phase = phase_of(start, inner, channels)
            if phase != tiled:
                if tiled >= 0:
                    add_all(to_theta, to_leak, to_height, to_begin, tiled_at, length, inner, sums[group])
                tile_all(v0, theta, fires_at, leak, start, length, inner, begin, th, fa, lk)
                tile(amplitude, start, length, inner, factor)
                for i in range(length):
                    inverse[i] = np.float32(1.0) / th[i]
                for i in range(length):
                    factor[i] = (np.float32(1.0) if unscaled else factor[i]) * scale * inverse[i]
                tiled, tiled_at = phase, start
            dv[:], total[:] = 0, 0
            rests[0, :] = begin
            for t in range(steps):
                load(x, 0 if constant else t, start, size, bits, half)
                integrate(value, lk, rests[t], size, potentials[t])
                reset(potentials[t], fa, th, size, rests[t + 1])
            for back in range(steps):
                t = steps - 1 - back
                m, earlier = potentials[t], rests[t]
                load(g, t, start, size, bits, half)
                errors(value, m, inverse, factor, width, shape, size, e)
                for i in range(size):
                    to_theta[i] -= e[i] * m[i] * inverse[i] + (dv[i] if m[i] >= fa[i] else np.float32(0.0))
                if unscaled:
                    for i in range(size):
                        to_height[i] += value[i]
                else:
                    for i in range(size):
                        to_height[i] += value[i] if m[i] >= fa[i] else np.float32(0.0)
                for i in range(size):
                    dv[i] = dv[i] + e[i]
                for i in range(size):
                    to_leak[i] += dv[i] * earlier[i]
                if constant:
                    for i in range(size):
                        total[i] += dv[i]
                else:
                    for i in range(size):
                        total[i] = dv[i]
                for i in range(size):
                    dv[i] = lk[i] * dv[i]
                if not constant or t == 0:
                    store(total, out_bits, 0 if constant else t, start, size, half, dx)
            for i in range(size):
                to_begin[i] += dv[i]
        add_all(to_theta, to_leak, to_height, to_begin, tiled_at, length, inner, sums[group])


@_inline
def climb(value, per_level, shift, levels, size, level):
    """Level = clip(floor(value per_level + shift), 0, levels)/levels; NaN stays NaN."""
    for i in range(size):
        step = np.floor(value[i] * per_level[i] + shift)
        step = np.float32(0.0) if step < np.float32(0.0) else step
        level[i] = (levels if step > levels else step) / levels


@_compile
def staircase(first, last, z, out, per_level, ceiling, channels, inner, length, shift, levels, half):
    """Fill groups `first` to `last` of `out` with the levels of `z`, times the ceiling."""
    number = out.shape[1]
    bits, out_bits = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    value, level = bits.view(np.float32), out_bits.view(np.float32)
    pl, ce = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    tiled = -1
    for start in range(first * GROUP * length, min(last * GROUP * length, number), length):
        size = min(length, number - start)
        phase = phase_of(start, inner, channels)
        if phase != tiled:
            tile(per_level, start, length, inner, pl)
            tile(ceiling, start, length, inner, ce)
            tiled = phase
        load(z, 0, start, size, bits, half)
        climb(value, pl, shift, levels, size, level)
        for i in range(size):
            level[i] = level[i] * ce[i]
        store(level, out_bits, 0, start, size, half, out)


@_inline
def triangles(value, per_level, shift, levels, size, inside):
    """2 at the jumps of the staircase, 0 halfway between them and beyond."""
    half, two = np.float32(0.5), np.float32(2.0)
    for i in range(size):
        climbed = value[i] * per_level[i] + shift
        slope = two * np.abs(two * (climbed - np.floor(climbed)) - np.float32(1.0))
        inside[i] = slope if (climbed >= half) & (climbed <= levels + half) else np.float32(0.0)


@_compile
def staircase_backward(first, last, z, g, dz, per_level, ceiling, low, high, sums, inner, length, shift, levels, triangular, half):
    """Fill groups `first` to `last` of `dz` and of `sums` `[groups, 1, K]`: gradients to z and to ceilings.

    They pass in [low, high], or as a triangle around each jump.
    """
    number, channels = g.shape[1], sums.shape[2]
    bits, g_bits, out_bits = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    value, gradient, passed = bits.view(np.float32), g_bits.view(np.float32), out_bits.view(np.float32)
    pl, ce, lo, hi = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    level, inside, to_ceiling = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    for group in range(first, last):
        tiled, tiled_at = -1, 0
        for start in range(group * GROUP * length, min((group + 1) * GROUP * length, number), length):
            size = min(length, number - start)
            phase = phase_of(start, inner, channels)
            if phase != tiled:
                if tiled >= 0:
                    add_up(to_ceiling, tiled_at, length, inner, sums[group, 0])
                tile_all(per_level, ceiling, low, high, start, length, inner, pl, ce, lo, hi)
                tiled, tiled_at = phase, start
            load(z, 0, start, size, bits, half)
            load(g, 0, start, size, g_bits, half)
            climb(value, pl, shift, levels, size, level)
            if triangular:
                triangles(value, pl, shift, levels, size, inside)
            else:
                for i in range(size):
                    inside[i] = np.float32(1.0) if (value[i] >= lo[i]) & (value[i] <= hi[i]) else np.float32(0.0)
            for i in range(size):
                level[i] = level[i] - inside[i] * (value[i] / ce[i])
            for i in range(size):
                to_ceiling[i] += level[i] * gradient[i]
            for i in range(size):
                passed[i] = inside[i] * gradient[i]
            store(passed, out_bits, 0, start, size, half, dz)
        add_up(to_ceiling, tiled_at, length, inner, sums[group, 0])
