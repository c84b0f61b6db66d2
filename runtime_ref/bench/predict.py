"""How fast a model should run on a machine, on paper: from its memory's and its arithmetic's speed (docs/edge.md).

A token is decoded in parts that follow one another; each takes as long as its bytes or its arithmetic, whichever is slower:

    seconds = max(projections' bytes / B, MACs / R) + max(head's bytes / B, MACs / R_head)
            + max(2.5 state bytes / B, elements / E) + (convolution, norms, quantisation) + barriers + call

B is the read bandwidth; R, R_head and E are rates of the kernels in cache, which follow from two numbers of a machine:
`macs` (ternary products a second of a thread in profile fast) and `elements` (state elements a second of a thread in fp32).
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime_ref.arithmetic import Fp16, Fp32, Int8, Int8Rows, Int16, preset_of
from runtime_ref.kernels.scratch import CHUNK
from runtime_ref.memory import resident_bytes
from tmexport.gguf.export import low_bit_types, tensor_layout
from tmexport.gguf.names import GROUP_SIZE_KEY, config_from_metadata
from tmexport.gguf.reader import GGUFFile
from tmexport.model import Model
from tmexport.model.spec import StateSpec
from tmexport.types import GGMLType

# Ratios of the kernels' rates in cache, measured one by one on an AMD Zen 3 (AVX2). Relative to `macs`:
PRODUCT = {Int16: 0.62, Int8: 1.0}  # a product; int16 activations have two planes
BLOCKED = {Int16: 0.80, Int8: 1.50}  # a product in a prompt, where a weight is unpacked once for several tokens
TABLES = {Int16: 1.25, Int8: 2.30}  # the same by tables of sums, where the kernels take those
HEAD = {GGMLType.Q8_0: 0.45, GGMLType.Q4_0: 0.45, GGMLType.F16: 0.25, GGMLType.F32: 0.25, GGMLType.BF16: 0.25}
# ... relative to `elements`:
STATE_PER_PRODUCT = 0.054  # `elements` of a machine of which only `macs` is known
STATE = {Fp32: 1.0, Fp16: 0.70, Int8Rows: 0.70}  # an element of a state
CONVOLUTION, NORM, QUANTIZE = 11.6, 2.8, 2.2  # elements' time for one channel, one value, one value
# A byte of state written costs more than one read; taken from a token of the 370m model (profile exact).
STATE_PASSES = 2.5
# Seconds, each measured alone: a barrier between two threads, and a call of a model with next to no weights.
BARRIER = 3e-6
CALL = 70e-6
BARRIERS_A_LAYER = 6


@dataclass(frozen=True)
class Speeds:
    """A machine with `threads` at work: bytes a second of all; ternary products and state elements a second of each.

    tables: whether its kernels multiply a prompt by tables of sums (kernels/tables.py), which AVX2's do.
    """

    bandwidth: float
    macs: float
    elements: float
    threads: int = 1
    tables: bool = False


@dataclass(frozen=True)
class Work:
    """What a model costs a token: bytes and products of its projections and head, elements of its state."""

    config: Model
    body_bytes: int
    head_bytes: int
    head_type: GGMLType

    @property
    def body_macs(self) -> int:
        shapes = [self.config.tensors[name].shape for name in self.config.projections]
        return sum(n * k for n, k in shapes)

    @property
    def state_elements(self) -> int:
        return sum(spec.size for spec in self._states() if spec.recurrent)

    def small_elements(self) -> float:
        """Convolution, norms and quantisation of a token, as state elements that take the same time."""
        convolved = sum(spec.shape[-1] for spec in self._states() if not spec.recurrent)
        values = sum(self.config.tensors[name].shape[-1] for name in self.config.projections)
        return CONVOLUTION * convolved + (NORM + QUANTIZE) * values

    def _states(self) -> list[StateSpec]:
        return [spec for block in self.config.blocks for branch in block.branches for spec in branch.states()]


def work_of(config: Model, body: GGMLType, head: GGMLType, group: int = 256) -> Work:
    """The work of a model of these dimensions and types."""
    layout = tensor_layout(config, low_bit_types(config, body, head))
    packed = {name: resident_bytes(shape, kind, group) for name, (shape, kind) in layout.items()}
    projections = sum(packed[config.tensors[name].gguf] for name in config.projections)
    return Work(config, projections, packed.get("output.weight", packed["token_embd.weight"]), head)


def work_of_file(gguf: GGUFFile) -> Work:
    """The work of a model in a file, from its header.

    Raises:
        GGUFError: it is damaged, or of another architecture.
    """
    config = config_from_metadata(gguf)
    body = gguf.tensors[config.tensors[config.projections[0]].gguf].type
    head = gguf.tensors["token_embd.weight" if config.tie_embeddings else "output.weight"].type
    return work_of(config, body, head, gguf.metadata.get(GROUP_SIZE_KEY, 64 if body is GGMLType.Q2_0 else 256))


def decode_seconds(work: Work, profile: str, speeds: Speeds) -> float:
    """Seconds of a decoded token."""
    rate = PRODUCT[type(preset_of(profile).activations)] * speeds.macs * speeds.threads
    return (
        max(work.body_bytes / speeds.bandwidth, work.body_macs / rate)
        + _head_seconds(work, speeds)
        + _state_seconds(work, profile, speeds, 1)
        + _small_seconds(work, speeds)
        + _overhead(work, speeds)
    )


def prefill_seconds(work: Work, profile: str, speeds: Speeds) -> float:
    """Seconds a token of a long prompt: weights, head and state come from memory once for a chunk of tokens."""
    rate = (TABLES if speeds.tables else BLOCKED)[type(preset_of(profile).activations)] * speeds.macs * speeds.threads
    return (
        max(work.body_bytes / CHUNK / speeds.bandwidth, work.body_macs / rate)
        + _state_seconds(work, profile, speeds, CHUNK)
        + _small_seconds(work, speeds)
        + (_head_seconds(work, speeds) + _overhead(work, speeds)) / CHUNK
    )


def _small_seconds(work: Work, speeds: Speeds) -> float:
    return work.small_elements() / (speeds.elements * speeds.threads)


def _overhead(work: Work, speeds: Speeds) -> float:
    """Seconds of a call whatever it computes."""
    return CALL + (BARRIERS_A_LAYER * work.config.n_layer * BARRIER if speeds.threads > 1 else 0.0)


def _head_seconds(work: Work, speeds: Speeds) -> float:
    macs = work.config.vocab_size * work.config.d_model
    return max(work.head_bytes / speeds.bandwidth, macs / (speeds.macs * speeds.threads * HEAD[work.head_type]))


def _state_seconds(work: Work, profile: str, speeds: Speeds, tokens: int) -> float:
    """Read and written once for `tokens`."""
    state = preset_of(profile).state
    share, moved = STATE[type(state)], STATE_PASSES * state.width * work.state_elements / tokens
    return max(moved / speeds.bandwidth, work.state_elements / (speeds.elements * speeds.threads * share))
