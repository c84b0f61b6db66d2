"""A Mamba-2 language model in numpy and fp64, from its equations (arXiv 2405.21060): what exact weights compute."""

import numpy as np
from scipy.linalg import hadamard


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def logits(config, tensors, ids):
    """fp64 [len(ids), vocab]; tensors: fp64 by Hugging Face name."""
    c = config.blocks[0].branches[0]
    stream = tensors["backbone.embeddings.weight"][ids]
    for number in range(len(config.blocks)):
        w = {
            n.removeprefix(f"backbone.layers.{number}."): t
            for n, t in tensors.items()
            if n.startswith(f"backbone.layers.{number}.")
        }
        stream = stream + mixer(c, w, rms_norm(stream, w["norm.weight"], config.rms_eps), config.rms_eps)
    head = tensors.get("lm_head.weight", tensors["backbone.embeddings.weight"])
    return rms_norm(stream, tensors["backbone.norm_f.weight"], config.rms_eps) @ head.T


def mixer(c, w, u, eps):
    z, xbc, dt = np.split(u @ w["mixer.in_proj.weight"].T, [c.d_inner, c.d_inner + c.conv_dim], axis=1)
    padded = np.concatenate([np.zeros((c.d_conv - 1, c.conv_dim)), xbc])
    taps = w["mixer.conv1d.weight"][:, 0]
    xbc = silu(w["mixer.conv1d.bias"] + sum(taps[:, i] * padded[i : i + len(u)] for i in range(c.d_conv)))
    x, b, cc = np.split(xbc, [c.d_inner, c.d_inner + c.n_groups * c.d_state], axis=1)
    x = x.reshape(-1, c.n_heads, c.headdim)
    b, cc = (np.repeat(m.reshape(-1, c.n_groups, c.d_state), c.n_heads // c.n_groups, axis=1) for m in (b, cc))
    dt = np.log1p(np.exp(dt + w["mixer.dt_bias"]))
    state, out = np.zeros((c.n_heads, c.headdim, c.d_state)), []
    for t in range(len(u)):
        decay = np.exp(-np.exp(w["mixer.A_log"]) * dt[t])
        state = state * decay[:, None, None] + (dt[t][:, None] * x[t])[:, :, None] * b[t][:, None]
        out.append((state * cc[t][:, None]).sum(-1) + w["mixer.D"][:, None] * x[t])
    y = (np.stack(out).reshape(len(u), -1) * silu(z)).reshape(len(u), c.n_groups, -1)
    y = rms_norm(y, w["mixer.norm.weight"].reshape(c.n_groups, -1), eps).reshape(len(u), -1)
    if c.online_hadamard:
        turn = hadamard(c.online_hadamard) / np.sqrt(c.online_hadamard)
        y = (y.reshape(len(u), -1, c.online_hadamard) @ turn).reshape(y.shape)
    return y @ w["mixer.out_proj.weight"].T
