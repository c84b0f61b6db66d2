"""The heads of attention (`reference.attention`): three passes over the positions, each sum in the specification's order.

Few rows: lanes are elements of a head, and the heads of a token that read the same keys take them from one tile. Many rows of one
text: lanes are 16 tokens, so that no sum goes across lanes; a token's own positions end before the last lane's, and what lies
beyond counts as +0.
"""

from __future__ import annotations

import numpy as np

from runtime_ref.kernels.compiled import kernel, stack
from runtime_ref.kernels.math import vector_exp
from runtime_ref.kernels.records import floats_at
from runtime_ref.kernels.states import load_state
from runtime_ref.kernels.vector import (
    clamp_below,
    largest,
    load,
    only_from,
    peek,
    poke,
    splat,
    store,
    tree_sum,
    tree_sums,
)

# ruff: noqa: ANN001, ANN201 - compiled functions, typed by Numba

LANES = 16  # of a vector: tokens, or positions, or elements; and heads that `attend_heads` takes at a time
MOST_WIDTH = 512  # of a head
TILE_BYTES = 4 * LANES * MOST_WIDTH
ZERO, LOWEST = np.float32(0.0), np.float32(-np.inf)


@kernel
def tile_positions(width):
    """Positions of a tile: 16 KB of fp32, or 16 where heads are wide."""
    return max(LANES, 4096 // width // LANES * LANES)


@kernel
def tile(kept_as, at, apart, count, width, room):
    """`count` positions of one head as fp32: where they are, and the bytes from one to the next. `room`: for those in another format."""
    if kept_as.width == 4:
        return at, apart
    for position in range(count):
        for i in range(0, width, 16):
            poke(room + 4 * (position * width + i), load_state(kept_as, at + position * apart + i * kept_as.width))
    return room, 4 * width


@kernel
def attend_heads(kept_as, low, heads, group, query, k_at, v_at, out, scores, count, width, keys, scale):
    """`heads` heads of one token, from number `low` on, at most LANES: `width` values each at `out`, from as many at `query` and
    `count` positions; `group` heads read the same keys. All heads read a tile before the next, so that memory is read in its order.
    """
    apart, most, row = keys * kept_as.width, tile_positions(width), scores.shape[0] // LANES
    room, end = stack(TILE_BYTES), -(-count // 16) * 16
    for first in range(0, count, most):
        n, at, step = min(most, count - first), np.int64(0), np.int64(0)
        for head in range(low, low + heads):
            if head == low or head % group == 0:
                start = k_at + first * apart + head // group * width * kept_as.width
                at, step = tile(kept_as, start, apart, n, width, room)
            place = (head - low) * row + first
            for i in range(0, n, 16):
                store(scores, place + i, sixteen_dots(query + 4 * head * width, at, step, i, n, width) * splat(scale))
    for head in range(heads):
        probabilities(scores[head * row : head * row + end], count)
    for first in range(0, count, most):
        n, at, step = min(most, count - first), np.int64(0), np.int64(0)
        for head in range(low, low + heads):
            if head == low or head % group == 0:
                start = v_at + first * apart + head // group * width * kept_as.width
                at, step = tile(kept_as, start, apart, n, width, room)
            place = (head - low) * row + first
            add_values(scores[place : place + n], at, step, width, out + 4 * head * width, first == 0)


@kernel
def sixteen_dots(query, at, step, first, count, width):
    """The sums (sum16) of the query and positions first, first + 1, ...; beyond `count` the last one's again."""
    sums_at = stack(1024)
    for lane in range(16):
        key, total, i = at + min(first + lane, count - 1) * step, splat(ZERO), 0
        while i + 64 <= width:
            total = total + peek(query + 4 * i) * peek(key + 4 * i)
            total = total + peek(query + 4 * i + 64) * peek(key + 4 * i + 64)
            total = total + peek(query + 4 * i + 128) * peek(key + 4 * i + 128)
            total = total + peek(query + 4 * i + 192) * peek(key + 4 * i + 192)
            i += 64
        while i < width:
            total = total + peek(query + 4 * i) * peek(key + 4 * i)
            i += 16
        poke(sums_at + 64 * lane, total)
    return tree_sums(floats_at(sums_at, 256))


@kernel
def probabilities(scores, count):
    """Of `count` scores, in place; what follows them up to a multiple of 16 becomes 0."""
    end = scores.shape[0]
    for i in range(count, end):
        scores[i] = LOWEST
    top = splat(LOWEST)
    for i in range(0, end, 16):
        top = clamp_below(load(scores, i), top)
    top, lanes = splat(largest(top)), splat(ZERO)
    for i in range(0, end - 16, 16):
        e = vector_exp(load(scores, i) - top)
        store(scores, i, e)
        lanes = lanes + e
    store(scores, end - 16, vector_exp(load(scores, end - 16) - top))
    for i in range(count, end):
        scores[i] = ZERO
    total = splat(tree_sum(lanes + load(scores, end - 16)))
    for i in range(0, end, 16):
        store(scores, i, load(scores, i) / total)


@kernel
def add_values(weighted, at, step, width, out, fresh):
    """out (0 if fresh) + the values of the positions times their weights, one after the other."""
    i = 0
    while i + 64 <= width:
        place, y0, y1, y2, y3 = out + 4 * i, splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        if not fresh:
            y0, y1, y2, y3 = peek(place), peek(place + 64), peek(place + 128), peek(place + 192)
        for position in range(weighted.shape[0]):
            p, value = splat(weighted[position]), at + position * step + 4 * i
            y0 = y0 + p * peek(value)
            y1 = y1 + p * peek(value + 64)
            y2 = y2 + p * peek(value + 128)
            y3 = y3 + p * peek(value + 192)
        poke(place, y0)
        poke(place + 64, y1)
        poke(place + 128, y2)
        poke(place + 192, y3)
        i += 64
    while i < width:
        y0 = splat(ZERO) if fresh else peek(out + 4 * i)
        for position in range(weighted.shape[0]):
            y0 = y0 + splat(weighted[position]) * peek(at + position * step + 4 * i)
        poke(out + 4 * i, y0)
        i += 16


@kernel
def attend_tokens(kept_as, head, rows, wide, k_at, v_at, scores, least, width, keys, scale):
    """One head of up to 16 tokens one after another, from `rows` into `wide`: the first sees `least` positions."""
    apart, most, live = keys * kept_as.width, tile_positions(width), rows.shape[0]
    room, turned, count = stack(TILE_BYTES), stack(TILE_BYTES), least + live - 1
    lanes = floats_at(turned, LANES * width)
    for lane in range(LANES):
        row = rows[min(lane, live - 1)]
        for i in range(width):
            lanes[LANES * i + lane] = row[head * width + i]
    top = splat(LOWEST)
    for first in range(0, count, most):
        n = min(most, count - first)
        at, step = tile(kept_as, k_at + first * apart, apart, n, width, room)
        for i in range(0, n, 2):
            one = floats_at(at + i * step, width)
            two = floats_at(at + min(i + 1, n - 1) * step, width)
            a, b = dots_of_two(turned, one, two, width)
            place = first + i
            a, b = a * splat(scale), b * splat(scale)
            if place + 2 > least:  # tokens that do not see these positions
                a = only_from(a, np.int32(place - least + 1), LOWEST)
                b = only_from(b, np.int32(place - least + 2), LOWEST)
            store(scores, LANES * place, a)
            store(scores, LANES * place + LANES, b)
            top = clamp_below(b, clamp_below(a, top))
    probabilities_of_lanes(scores, count, least, top)
    for i in range(0, LANES * width, 16):
        store(lanes, i, splat(ZERO))
    for first in range(0, count, most):
        n = min(most, count - first)
        at, step = tile(kept_as, v_at + first * apart, apart, n, width, room)
        for i in range(0, width, 8):
            add_eight(scores[LANES * first :], at + 4 * i, step, n, turned + 64 * i)
    for lane in range(live):
        row = wide[lane]
        for i in range(width):
            row[head * width + i] = lanes[LANES * i + lane]


@kernel
def dots_of_two(turned, one, two, width):
    """The sums (sum16) of 16 queries, [width, 16] at `turned`, and two keys."""
    a, b = quarter(turned, one, two, width, 0)
    c, d = quarter(turned, one, two, width, 2)
    even, even_of_two = a + c, b + d
    a, b = quarter(turned, one, two, width, 1)
    c, d = quarter(turned, one, two, width, 3)
    return even + (a + c), even_of_two + (b + d)


@kernel
def quarter(turned, one, two, width, j):
    """What sum16's tree makes of its accumulators j, j + 4, j + 8, j + 12."""
    a0, a4, a8, a12 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    b0, b4, b8, b12 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    for i in range(j, width, 16):
        q = peek(turned + 64 * i)
        a0, b0 = a0 + q * splat(one[i]), b0 + q * splat(two[i])
        q = peek(turned + 64 * i + 256)
        a4, b4 = a4 + q * splat(one[i + 4]), b4 + q * splat(two[i + 4])
        q = peek(turned + 64 * i + 512)
        a8, b8 = a8 + q * splat(one[i + 8]), b8 + q * splat(two[i + 8])
        q = peek(turned + 64 * i + 768)
        a12, b12 = a12 + q * splat(one[i + 12]), b12 + q * splat(two[i + 12])
    return (a0 + a8) + (a4 + a12), (b0 + b8) + (b4 + b12)


@kernel
def probabilities_of_lanes(scores, count, least, top):
    """Of [count, 16] scores, in place, a token a lane; `top` the largest of each."""
    sums_at = stack(1024)
    sums = floats_at(sums_at, 256)
    for i in range(0, 256, 16):
        store(sums, i, splat(ZERO))
    for position in range(count):
        e = vector_exp(load(scores, LANES * position) - top)
        if position >= least:
            e = only_from(e, np.int32(position - least + 1), ZERO)
        store(scores, LANES * position, e)
        place = LANES * (position % 16)
        store(sums, place, load(sums, place) + e)
    half = 8
    while half:
        for i in range(half):
            store(sums, LANES * i, load(sums, LANES * i) + load(sums, LANES * (i + half)))
        half //= 2
    total = load(sums, 0)
    for i in range(0, LANES * count, 16):
        store(scores, i, load(scores, i) / total)


@kernel
def add_eight(scores, at, step, count, out):
    """Eight elements of the values, times the weights of 16 tokens, added to [8, 16] at `out`."""
    y0, y1, y2, y3 = peek(out), peek(out + 64), peek(out + 128), peek(out + 192)
    y4, y5, y6, y7 = peek(out + 256), peek(out + 320), peek(out + 384), peek(out + 448)
    for position in range(count):
        p, value = load(scores, LANES * position), floats_at(at + position * step, 8)
        y0, y1 = y0 + p * splat(value[0]), y1 + p * splat(value[1])
        y2, y3 = y2 + p * splat(value[2]), y3 + p * splat(value[3])
        y4, y5 = y4 + p * splat(value[4]), y5 + p * splat(value[5])
        y6, y7 = y6 + p * splat(value[6]), y7 + p * splat(value[7])
    poke(out, y0)
    poke(out + 64, y1)
    poke(out + 128, y2)
    poke(out + 192, y3)
    poke(out + 256, y4)
    poke(out + 320, y5)
    poke(out + 384, y6)
    poke(out + 448, y7)
