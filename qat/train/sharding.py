"""Weights, gradients and optimiser shared out between processes (FSDP2), and whole again for what is saved.

torch's `fully_shard` is called directly: accelerate 1.15 leaves a FullyShardedDataParallelPlugin out where the processes run
on CPUs, and one path for CPU and GPU is one that the tests run. Each layer is gathered before it computes, so the
fake-quantiser always sees whole rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, layers: nn.ModuleList, device: torch.device, processes: int) -> None:
    """Shard the parameters of `module` in place, each of its `layers` as a unit of its own."""
    mesh = init_device_mesh(device.type, (processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def whole(state: Any) -> Any:
    """A state_dict with every sharded tensor gathered; all processes must call it."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    return state


def _as_sharded(value: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def load_whole(model: nn.Module, optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor], state: Any) -> None:
    """Load whole state_dicts into a model and its optimiser, sharded or not; all processes must call it."""
    current = model.state_dict()
    model.load_state_dict({name: _as_sharded(value, current.get(name, value)) for name, value in weights.items()})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shared = {
        index: {key: _as_sharded(value, parameters[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shared})
