"""The Mamba-2 mixer between its projections: the convolution, and the scan with its gate (`reference`, _mixer)."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from runtime_ref.arithmetic import Fp16, Fp32
from runtime_ref.kernels.intrinsics import pointer_f32, pointer_u16
from runtime_ref.kernels.isa import PRIMITIVES
from runtime_ref.kernels.math import exp, softplus, vector_silu
from runtime_ref.kernels.tiles import F32, HALF, Code
from runtime_ref.kernels.vector import (
    LANES,
    address,
    ask_for_line,
    load,
    peek,
    poke,
    splat,
    splatted,
    store,
    tree_sums,
)

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

TOKENS = 8  # whose channels' state stays in registers
AHEAD = 8192  # bytes of state to ask for in advance, when every byte is read for one token
_VECTOR = 4 * LANES


@njit
def convolve(dims, small, layer, s, conv, first, rows, low, high):
    """Channels low..high of the causal convolution over `rows` consecutive tokens; `conv` [K-1, C] is updated."""
    keep = dims.d_conv - 1
    bias, weight = address(small.conv_bias[layer]), address(small.conv_weight[layer])
    before, row = conv.strides[0], s.proj.strides[0]
    # of the channel 0, one row before the first token's at a time
    past, now = address(conv), address(s.proj[first]) + 4 * dims.d_inner
    for t in range(rows):
        target = address(s.xbc[first + t])
        if keep == 3:
            x0 = now + (t - 3) * row if t >= 3 else past + t * before
            x1 = now + (t - 2) * row if t >= 2 else past + (t + 1) * before
            x2 = now + (t - 1) * row if t >= 1 else past + (t + 2) * before
            x3 = now + t * row
            w0, w1, w2, w3 = weight, weight + before, weight + 2 * before, weight + 3 * before
            for at in range(4 * low, 4 * high, _VECTOR):
                total = peek(bias + at) + peek(w0 + at) * peek(x0 + at)
                total = total + peek(w1 + at) * peek(x1 + at)
                total = total + peek(w2 + at) * peek(x2 + at)
                total = total + peek(w3 + at) * peek(x3 + at)
                poke(target + at, vector_silu(total))
        else:
            for at in range(4 * low, 4 * high, _VECTOR):
                total = peek(bias + at)
                for tap in range(keep + 1):
                    age = t + tap - keep
                    x = now + age * row if age >= 0 else past + (t + tap) * before
                    total = total + peek(weight + tap * before + at) * peek(x + at)
                poke(target + at, vector_silu(total))
    for tap in range(keep):
        age = rows + tap - keep
        x = now + age * row if age >= 0 else past + (rows + tap) * before
        for at in range(4 * low, 4 * high, _VECTOR):
            poke(past + tap * before + at, peek(x + at))


def state_pointer(kept_as, address):
    """The SSM state at an address: fp32, or the bits of fp16."""


@overload(state_pointer)
def _state_pointer(kept_as, address):
    return {
        Fp32: lambda kept_as, address: pointer_f32(address),
        Fp16: lambda kept_as, address: pointer_u16(address),
    }[kept_as.instance_class]


@intrinsic
def _scan_pair(typingctx, isa, kept_as, h, n, xbc, stride, x_at, b_at, c_at, decay, dt, tokens, sums):
    """Two neighbouring channels of a head over `tokens` consecutive tokens, from an address each.

    h: the first channel's state, n elements, the second's behind it; read once, updated in registers, written once. xbc: the
    first token's row, `stride` bytes a row, in which x_at, b_at and c_at are the bytes before the first channel's x, and
    before B and C. decay, dt: fp32 [tokens]. sums: fp32 [tokens][16 channels][16 lanes], of which the two channels' are set.
    The state is rounded to its format after every token; the sums read it before.
    """
    stored = {Fp32: F32, Fp16: HALF}[kept_as.instance_class]
    widths = PRIMITIVES[isa.instance_class].scan
    sig = types.void(isa, kept_as, *[types.int64] * 11)

    def codegen(context, builder, sig, args):
        code, b = Code(builder), builder
        h_at, n, row_bytes, count = code.pointer(args[2]), args[3], args[5], args[11]
        rows, decay_at, dt_at, sums_at = (code.pointer(args[i]) for i in (4, 9, 10, 12))
        wide, kept = ir.VectorType(F32, LANES), ir.VectorType(stored, LANES)
        size = 4 if stored is F32 else 2
        channels = (h_at, code.at(h_at, b.mul(n, code.i64(size))))
        once = b.icmp_signed("==", count, code.i64(1))

        def part(start, width):
            """`width` vectors of both channels, from element `start`."""
            places = [
                [code.at(channel, b.mul(b.add(start, code.i64(LANES * i)), code.i64(size))) for i in range(width)]
                for channel in channels
            ]
            with b.if_then(once):
                for place in [place for channel in places for place in channel][:: 4 // size]:
                    ask_for_line(b, code.at(place, AHEAD), level=2)
            h = [code.load(place, kept, size) for channel in places for place in channel]
            beginning = b.icmp_signed("==", start, code.i64(0))

            def token(t, h):
                row = code.at(rows, b.mul(t, row_bytes))
                four = b.mul(t, code.i64(4))
                fade = splatted(b, code.load(code.at(decay_at, four), F32, 4), LANES)
                step = code.load(code.at(dt_at, four), F32, 4)
                x = code.at(row, args[6])
                inputs = [splatted(b, b.fmul(step, code.load(code.at(x, 4 * i), F32, 4)), LANES) for i in range(2)]
                target = code.at(sums_at, b.mul(t, code.i64(16 * _VECTOR)))
                lanes = [
                    b.select(beginning, ir.Constant(wide, None), code.load(code.at(target, _VECTOR * i), wide, 4))
                    for i in range(2)
                ]
                following = list(h)
                for i in range(width):
                    offset = b.mul(b.add(start, code.i64(LANES * i)), code.i64(4))
                    b_part, c_part = (code.load(code.at(code.at(row, args[k]), offset), wide, 4) for k in (7, 8))
                    for channel in range(2):
                        old = h[channel * width + i]
                        old = old if stored is F32 else b.fpext(old, wide)
                        new = b.fadd(b.fmul(old, fade), b.fmul(inputs[channel], b_part))
                        lanes[channel] = b.fadd(lanes[channel], b.fmul(new, c_part))
                        following[channel * width + i] = new if stored is F32 else b.fptrunc(new, kept)
                for i in range(2):
                    code.store(lanes[i], code.at(target, _VECTOR * i))
                return following

            h = code.loop(count, h, token)
            for value, place in zip(h, [place for channel in places for place in channel], strict=True):
                code.store(value, place, size)

        start = code.i64(0)
        for width in widths:
            elements = code.i64(LANES * width)
            parts = b.sdiv(b.sub(n, start), elements)
            with b.if_then(b.icmp_signed(">", parts, code.i64(0))):
                begin = start

                def run(i, _, begin=begin, width=width, elements=elements):
                    part(b.add(begin, b.mul(i, elements)), width)
                    return []

                code.loop(parts, [], run)
            start = b.add(start, b.mul(parts, elements))
        return context.get_dummy_value()

    return sig, codegen


@njit
def scan_head(isa, kept_as, dims, small, layer, s, ssm, first, rows, head):
    """The recurrence of one head over `rows` consecutive tokens, and the gate; ssm [H, P, N] is updated."""
    n, width, base = dims.d_state, dims.headdim, head * dims.headdim
    group = head // (dims.n_heads // dims.n_groups)
    b_at = 4 * (dims.d_inner + group * n)
    c_at = b_at + 4 * dims.n_groups * n
    dt_at, bias, a = dims.d_inner + dims.conv_dim + head, small.dt_bias[layer, head], small.a[layer, head]
    skip, states, stride = splat(small.d[layer, head]), ssm[head], s.xbc.strides[0]
    sums, dt, decay = np.empty(TOKENS * 256, np.float32), np.empty(TOKENS, np.float32), np.empty(TOKENS, np.float32)
    for start in range(0, rows, TOKENS):
        r, count = first + start, min(TOKENS, rows - start)
        for t in range(count):
            dt[t] = softplus(s.proj[r + t, dt_at] + bias)
            decay[t] = exp(dt[t] * a)
        xbc = address(s.xbc[r])
        for p in range(0, width, 16):
            for channel in range(p, p + 16, 2):
                _scan_pair(
                    isa, kept_as, address(states[channel]), n, xbc, stride, 4 * (base + channel), b_at, c_at,
                    address(decay), address(dt), count, address(sums) + (channel - p) * _VECTOR,
                )  # fmt: skip
            for t in range(count):
                at = base + p
                y = tree_sums(sums[t * 256 : (t + 1) * 256]) + skip * load(s.xbc[r + t], at)
                store(s.wide[r + t], at, y * vector_silu(load(s.proj[r + t], at)))
