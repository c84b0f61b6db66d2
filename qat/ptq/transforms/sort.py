"""Heads and channels of a Mamba-2 mixer in another order: those that are alike side by side.

Quamba2 (arXiv 2503.22879): heads of an SSM group are clustered by the profile of their channels' mean |x|, x being what the
scan reads, by Ward's method; the channels of a cluster's heads by k-means; each in the order of its size. A static scale for
every pair of clusters then fits its channels, and our blocks of 32 along out_proj's inputs hold channels of like size.
Permutations stay inside a group, whose heads share B and C, and channels inside their head.
"""

from __future__ import annotations

import numpy as np
from scipy.cluster.hierarchy import fcluster, ward
from scipy.cluster.vq import kmeans2
from torch import Tensor

from qat.ptq.statistics import gather, scanned_name
from qat.ptq.transforms.work import Work
from tmexport.errors import UsageError
from tmexport.model.branches.mamba2 import Mamba2

CLUSTERS = 4  # of heads and of channels, as in Quamba2


def sort(work: Work, ids: Tensor | None, seed: int) -> None:
    """Sort every Mamba-2 mixer; others are left as they are.

    Raises:
        UsageError: what out_proj reads is turned already.
    """
    assert ids is not None
    found = gather(work.model(), ids)
    clusters = {}
    for number, block in enumerate(work.config.blocks):
        for branch in block.branches:
            if isinstance(branch, Mamba2) and branch.online_hadamard:
                raise UsageError("--transform sort: out_proj's inputs are turned already; put sort before online")
            if isinstance(branch, Mamba2):
                (in_proj,) = work.named("in_proj", block=number)
                mean = found[scanned_name(in_proj.hf)].mean[: branch.d_inner]
                channels, sizes = order(branch, mean, seed)
                _permute(work, number, branch, channels)
                clusters[str(number)] = sizes
    work.record("sort", clusters=clusters, seed=seed)


def order(branch: Mamba2, mean: np.ndarray, seed: int) -> tuple[np.ndarray, list[list[list[int]]]]:
    """Where every channel of x comes from, int [d_inner], and for each group its clusters of heads as [heads, sizes of the
    clusters of channels ...]. mean: of |x|, fp64 [d_inner].
    """
    profile = mean.reshape(branch.n_groups, -1, branch.headdim)
    result, sizes = [], []
    for group, heads in enumerate(profile):
        first = group * heads.shape[0]
        own: list[list[int]] = []
        for cluster in _by_size(_heads(heads), heads.mean(1)):
            members = [cluster[at] for at in np.argsort(heads[cluster].mean(1), kind="stable")]
            # the channels of a cluster's heads are clustered by rank: a head's own order is free
            ranked = np.array([np.sort(heads[h]) for h in members])
            parts = _by_size(_channels(ranked, seed), ranked.mean(0))
            for h in members:
                by_rank = np.argsort(heads[h], kind="stable")
                places = np.concatenate([by_rank[part] for part in parts])
                result.append((first + h) * branch.headdim + places)
            own.append([len(members), *map(len, parts)])
        sizes.append(own)
    return np.concatenate(result), sizes


def _heads(profile: np.ndarray) -> np.ndarray:
    """A cluster's number for every head, from [heads, headdim]."""
    if len(profile) < 2:
        return np.zeros(len(profile), int)
    return fcluster(ward(np.sort(profile, axis=1)), CLUSTERS, "maxclust")


def _channels(profile: np.ndarray, seed: int) -> np.ndarray:
    """A cluster's number for every channel, from [heads, channels]."""
    wanted = min(CLUSTERS, profile.shape[1])
    return kmeans2(profile.T, wanted, minit="++", seed=seed, missing="warn")[1]


def _by_size(labels: np.ndarray, size: np.ndarray) -> list[list[int]]:
    """The members of each cluster, the cluster of the smallest mean first; members ascending by size."""
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    members.sort(key=lambda m: size[m].mean())
    return [list(m[np.argsort(size[m], kind="stable")]) for m in members]


def _permute(work: Work, block: int, branch: Mamba2, channels: np.ndarray) -> None:
    """Channels of x, and with them z, the gated norm and out_proj's inputs; with a head its dt, A and D."""
    heads = channels[:: branch.headdim] // branch.headdim
    rest = np.arange(2 * branch.d_inner, branch.d_inner + branch.conv_dim)
    dt = branch.d_inner + branch.conv_dim + heads
    rows = np.concatenate([channels, branch.d_inner + channels, rest, dt])
    work.put("in_proj", block, work.get("in_proj", block)[rows])
    conv = np.concatenate([channels, np.arange(branch.d_inner, branch.conv_dim)])
    for role, index in (("conv_weight", conv), ("conv_bias", conv), ("dt_bias", heads), ("a", heads), ("d", heads)):
        work.put(role, block, work.get(role, block)[index])
    for tensor in work.named("gate_norm", block=block):
        work.tensors[tensor.hf] = work.tensors[tensor.hf].reshape(-1)[channels]
    work.put("out_proj", block, work.get("out_proj", block)[:, channels])
