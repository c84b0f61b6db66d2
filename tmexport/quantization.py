"""quantization_config: which weights of a checkpoint are codes and scales, by role (docs/checkpoint.md).

Version 1 (quant_method "ternary") has every projection of the blocks ternary, in groups of one size; version 2 (quant_method
"tmexport") says the kind and the group size of each role.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tmexport.errors import CheckpointError, UsageError
from tmexport.model import Model
from tmexport.model.branches.mlp import SwiGLU
from tmexport.types import KINDS
from tmexport.types.base import in_words

VERSION_1, VERSION_2 = 1, 2


@dataclass(frozen=True)
class Stored:
    """How the weights of a role are stored: a key of KINDS, and the weights that share a scale."""

    kind: str
    group_size: int


def low_bit_roles(model: Model) -> dict[str, bool]:
    """The roles that may be low-bit, and whether they are inside the blocks."""
    return {tensor.role: tensor.block is not None for tensor in model.tensors.values() if tensor.low_bit}


def projections_of(model: Model, choice: str) -> dict[str, str]:
    """The role of each projection that a choice names, by its Hugging Face name, in the order of the file.

    Args:
        model: whose projections.
        choice: all; mixers, which are all but those of the MLPs; or roles, with commas between them.

    Raises:
        UsageError: a role that the model does not have.
    """
    roles = {name: model.tensors[name].role for name in model.projections}
    known = set(roles.values())
    mlps = {
        spec.role for block in model.blocks for b in block.branches if b.kind == SwiGLU.kind for spec in b.tensors()
    }
    wanted = {"all": known, "mixers": known - mlps}.get(choice) or set(choice.split(","))
    unknown = sorted(wanted - known)
    if unknown:
        raise UsageError(
            f"the model has no projections {unknown[0]!r}; expected all, mixers or some of {', '.join(dict.fromkeys(roles.values()))}"
        )
    return {name: role for name, role in roles.items() if role in wanted}


def fitting_group(sizes: Iterable[int], length: int) -> int:
    """The first of these group sizes that divides rows of this length; 0: none does."""
    return next((size for size in sizes if length % size == 0), 0)


def group_for(kind: str, group_size: int | None, name: str, length: int) -> int:
    """The group size for a matrix with rows of this length; None: the kind's widest that divides them.

    Raises:
        UsageError: the group size is none of the kind's, or does not divide the rows.
    """
    sizes = KINDS[kind].group_sizes
    if group_size is not None and group_size not in sizes:
        raise UsageError(f"{kind} weights in groups of {group_size} are not supported; expected {in_words(sizes)}")
    tried = sizes if group_size is None else (group_size,)
    if size := fitting_group(tried, length):
        return size
    raise UsageError(
        f"group size {in_words(tried)} does not fit rows of {length} ({name}); expected {in_words(sizes)}, and a divisor"
    )


def read_quantization(raw: Mapping[str, Any], model: Model, where: object) -> dict[str, Stored]:
    """The stored form of every role that is not dense; empty for a full-precision checkpoint.

    Args:
        raw: config.json.
        model: what it describes.
        where: for the error.

    Raises:
        CheckpointError: it is of another method or version, or names a role, a kind or a group size that cannot be.
    """
    config = raw.get("quantization_config")
    if config is None:
        return {}
    readers = {"ternary": (VERSION_1, _read_version_1), "tmexport": (VERSION_2, _read_version_2)}
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(method, str) or method not in readers:
        raise CheckpointError(
            f"{where}: quantization_config is {config!r}; expected none, or quant_method 'ternary' or 'tmexport'"
        )
    version, read = readers[method]
    if config.get("version") != version:
        raise CheckpointError(
            f"{where}: {method} checkpoint version {config.get('version')!r}; this release reads {version}; install a newer tmexport"
        )
    return read(config, model, where)


def _read_version_1(config: Mapping[str, Any], model: Model, where: object) -> dict[str, Stored]:
    stored = stored_form("ternary", config.get("group_size"), where)
    return {role: stored for role, in_block in low_bit_roles(model).items() if in_block}


def _read_version_2(config: Mapping[str, Any], model: Model, where: object) -> dict[str, Stored]:
    weights, roles = config.get("weights"), low_bit_roles(model)
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(
            f"{where}: quantization_config.weights is {weights!r}; expected an object with a role or more"
        )
    found = {}
    for role, entry in weights.items():
        if role not in roles:
            raise CheckpointError(f"{where}: quantization_config.weights has {role!r}; expected {', '.join(roles)}")
        if not isinstance(entry, dict) or set(entry) - {"kind", "group_size"}:
            raise CheckpointError(f"{where}: the weights of {role} are {entry!r}; expected a kind and a group_size")
        found[role] = stored_form(entry.get("kind"), entry.get("group_size"), where)
    return found


def stored_form(kind: Any, group_size: Any, where: object) -> Stored:
    """Raises CheckpointError for a kind or a group size that is none; where: for the error."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(f"{where}: the kind of weights is {kind!r}; expected {' or '.join(map(repr, KINDS))}")
    sizes = KINDS[kind].group_sizes
    if isinstance(group_size, bool) or group_size not in sizes:
        raise CheckpointError(f"{where}: group_size is {group_size!r}; expected {in_words(sizes)}")
    return Stored(kind, group_size)


def write_quantization(
    stored: Mapping[str, Stored], model: Model, provenance: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """The quantization_config of these roles: None without any, version 1 where that can say it. provenance: how the weights
    were made, for people and scripts; nothing here reads it.
    """
    if not stored:
        return None
    inside = {role for role, in_block in low_bit_roles(model).items() if in_block}
    forms = set(stored.values())
    if not provenance and set(stored) == inside and len(forms) == 1 and next(iter(forms)).kind == "ternary":
        return {"quant_method": "ternary", "group_size": forms.pop().group_size, "version": VERSION_1}
    weights = {role: {"kind": form.kind, "group_size": form.group_size} for role, form in stored.items()}
    told = {"provenance": dict(provenance)} if provenance else {}
    return {"quant_method": "tmexport", "version": VERSION_2, "weights": weights, **told}
