"""What a product of a quantised matrix and quantised activations must be, from integer sums in numpy."""

import numpy as np


def specified(codes, scales, q, q_scale):
    """fp32 [tokens, n]: the exact integer sum of each activation block, scaled, added in ascending order.

    codes int8 [n, k], scales [n, k / group], q int32 [tokens, k], q_scale fp32 [tokens, k / block].
    """
    (n, k), (tokens, blocks) = codes.shape, q_scale.shape
    block, group = k // blocks, k // scales.shape[1]
    sums = np.einsum(
        "nbk,tbk->tnb",
        codes.astype(np.int64).reshape(n, blocks, block),
        q.astype(np.int64).reshape(tokens, blocks, block),
    )
    y = np.zeros((tokens, n), np.float32)
    for b in range(blocks):
        scale = scales[:, b * block // group].astype(np.float32)
        y += sums[:, :, b].astype(np.float32) * (scale * q_scale[:, b : b + 1])
    return y
