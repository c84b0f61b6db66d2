"""OrtModel: a file written by `tmexport onnx`, run by onnxruntime with its state kept in place (IOBinding).

    model = OrtModel.load("model.onnx", threads=2)
    state = model.new_state()
    logits = model.prefill(state, [1, 2, 3])    # fp32 [vocab], after the last token
    logits = model.decode(state, 4)

The recurrent state (100 MB for a 1.3B model) is never copied to Python: each call reads one set of buffers, writes the
other, and the two change places. In the ort form, and with the kernels of the custom one, the larger part, the SSM state, has one
buffer for both. Keys and values of attention grow: onnxruntime writes them anew at every call.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime_ref.sampling import Sampling, continue_tokens
from tmexport.errors import UsageError
from tmexport.model.rope import context_limit
from tmexport.onnx.names import GraphState, ModelInfo, OnnxError, info_from_metadata, model_states
from tmexport.threads import default_threads

_CHUNK = 512  # tokens of a prompt that are read at once


class OrtState:
    """What a model remembers of `batch` texts: two sets of buffers, the current one and the one written next.

    With `in_place` a recurrent state has the same buffer in both sets. LinearAttention (CPU) copies the one to the other and
    then works on that; sharing saves the copy, some 40 % of the operator's time at decode. Our kernels read what they write. After an error inside onnxruntime
    such a state is no longer meaningful.
    """

    def __init__(self, batch: int, states: Sequence[GraphState], arrays: Sequence[np.ndarray], in_place: bool) -> None:
        import onnxruntime as ort

        self.batch = batch
        self._states = states
        first = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
        other = [
            value
            if state.grows or (in_place and state.in_place)
            else ort.OrtValue.ortvalue_from_shape_and_type(value.shape(), np.float32)
            for state, value in zip(states, first, strict=True)
        ]
        self.sets = [first, other]
        self.current = 0
        self.decoders: dict[int, tuple[Any, Any, Any]] = {}  # current set -> binding, ids, logits of a single step

    @property
    def positions(self) -> int:
        """Those that the states which grow have; 0 without one."""
        pairs = zip(self._states, self.sets[self.current], strict=True)
        return next((value.shape()[2] for state, value in pairs if state.grows), 0)

    def bind(self, binding: Any) -> None:
        """Inputs from the current set, outputs into the other, after the logits; onnxruntime makes room for those that grow."""
        past, present = self.sets[self.current], self.sets[1 - self.current]
        for state, value_in, value_out in zip(self._states, past, present, strict=True):
            binding.bind_ortvalue_input(state.past, value_in)
            if state.grows:
                binding.bind_output(state.present)
            else:
                binding.bind_ortvalue_output(state.present, value_out)

    def bind_growing(self, binding: Any) -> None:
        """The same for the states that grow alone: in a binding that was used before."""
        for state, value in zip(self._states, self.sets[self.current], strict=True):
            if state.grows:
                binding.bind_ortvalue_input(state.past, value)
                binding.bind_output(state.present)

    def advance(self, binding: Any) -> None:
        """What the call wrote is the current set."""
        import onnxruntime as ort

        self.current = 1 - self.current
        growing = [i for i, state in enumerate(self._states) if state.grows]
        written = binding.get_outputs_as_ortvaluevector() if growing else ()
        for i in growing:
            self.sets[0][i] = self.sets[1][i] = ort.OrtValue(written[1 + i])

    def arrays(self) -> dict[str, np.ndarray]:
        """A copy of the state by input name: what `OrtModel.state_from` takes."""
        pairs = zip(self._states, self.sets[self.current], strict=True)
        return {state.past: np.array(value.numpy()) for state, value in pairs}


class OrtModel:
    """A session and what the file says about itself. One model serves many states, one call at a time."""

    def __init__(self, session: Any, info: ModelInfo, path: Path, kernels: bool, native: bool = False) -> None:
        self.session, self.info, self.path, self.kernels = session, info, path, kernels
        self._in_place = native or info.form == "ort"
        self.config = info.config
        self._states = model_states(info.config, info.io_names)
        grows = any(state.grows for state in self._states)
        self._limit = context_limit(info.config.context_length) if grows else None

    @classmethod
    def load(cls, path: Path | str, threads: int | None = None, kernels: bool = False) -> OrtModel:
        """Open a file.

        Args:
            path: written by `tmexport onnx`.
            threads: of onnxruntime; None: `tmexport.threads.default_threads`.
            kernels: run the operators of a custom form with runtime_ref's arithmetic (`register_kernels`).

        Raises:
            OnnxError: there is no such file, onnxruntime cannot run it, or tmexport did not write it.
        """
        import onnxruntime as ort

        path = Path(path)
        if not path.is_file():
            raise OnnxError(f"{path}: no such file; expected a file written by `tmexport onnx`")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None and not 1 <= threads <= 1024:
            raise UsageError(f"{threads} threads; expected 1 to 1024")
        options.intra_op_num_threads = threads or default_threads()
        native = False
        if kernels:
            from runtime_ref.ort.custom_ops import raise_failure, register_kernels

            native = register_kernels(options)
        try:
            source: bytes | str = _mapped(path, options) if native else str(path)
            session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base of their own
            if kernels:
                raise_failure()
            raise OnnxError(
                f"{path}: onnxruntime {ort.__version__} cannot load it: {_one_line(error)}; see docs/onnx.md for the versions"
            ) from None
        _return_memory()
        info = info_from_metadata(session.get_modelmeta().custom_metadata_map, path)
        model = cls(session, info, path, kernels, native)
        model._check_inputs()
        return model

    def new_state(self, batch: int = 1) -> OrtState:
        """The state before the first token of `batch` texts."""
        return self._state(batch, [np.zeros(state.sizes(batch, 0), np.float32) for state in self._states])

    def state_from(self, arrays: Mapping[str, np.ndarray]) -> OrtState:
        """A state from arrays by input name (past_conv.0, past_ssm.0, ...), fp32.

        Raises:
            OnnxError: one is missing or has the wrong shape or type.
        """
        first = self._states[0].past
        if first not in arrays:
            raise OnnxError(f"the state has no {first}; expected an array for every past_* input")
        batch = arrays[first].shape[0] if arrays[first].ndim else 0
        growing = next((arrays.get(state.past) for state in self._states if state.grows), None)
        positions = growing.shape[2] if growing is not None and growing.ndim == 4 else 0
        found = []
        for state in self._states:
            array, wanted = arrays.get(state.past), state.sizes(batch, positions)
            if array is None or array.shape != wanted or array.dtype != np.float32:
                have = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
                raise OnnxError(f"the state's {state.past} is {have}; expected float32 {list(wanted)}")
            found.append(np.ascontiguousarray(array))
        return self._state(batch, found)

    def _state(self, batch: int, arrays: Sequence[np.ndarray]) -> OrtState:
        return OrtState(batch, self._states, arrays, in_place=self._in_place)

    def run(self, state: OrtState, ids: np.ndarray) -> np.ndarray:
        """Feed ids int64 [batch, time]; logits fp32 [batch, time, vocab] ([batch, 1, vocab] if the file gives the last only).

        The state is updated.

        Raises:
            UsageError: no tokens, one outside the vocabulary, or more than the context of a model with attention holds.
        """
        ids = np.ascontiguousarray(ids, np.int64)
        if ids.ndim != 2 or ids.shape[0] != state.batch or not ids.shape[1]:
            raise UsageError(f"the tokens have the shape {list(ids.shape)}; expected [{state.batch}, at least 1]")
        outside = (ids < 0) | (ids >= self.config.vocab_size)
        if outside.any():
            raise UsageError(f"token {ids[outside][0]} is outside the vocabulary of {self.config.vocab_size}")
        if self._limit is not None and state.positions + ids.shape[1] > self._limit:
            raise UsageError(
                f"the text has {state.positions} tokens and {ids.shape[1]} more; the model's context holds {self._limit}"
            )
        if ids.shape[1] == 1:
            logits = self._step(state, ids)
        else:
            binding = self.session.io_binding()
            binding.bind_cpu_input("input_ids", ids)
            binding.bind_output("logits")
            state.bind(binding)
            self._run(binding)
            logits = binding.get_outputs()[0].numpy()
            state.advance(binding)
        return logits

    def prefill(self, state: OrtState, tokens: Sequence[int]) -> np.ndarray:
        """Logits fp32 [vocab] after the last of `tokens`, for a state of one text; the state is updated.

        Some at a time: a file that gives the logits of every position would make gigabytes of them for a long prompt.
        """
        ids = np.array([list(tokens)], np.int64).reshape(1, -1)
        for start in range(0, ids.shape[1] - _CHUNK, _CHUNK):
            self.run(state, ids[:, start : start + _CHUNK])
        rest = max(0, (ids.shape[1] - 1) // _CHUNK * _CHUNK)
        return self.run(state, ids[:, rest:])[0, -1]

    def decode(self, state: OrtState, token: int) -> np.ndarray:
        """Logits fp32 [vocab] after one more token, for a state of one text; the state is updated."""
        return self.run(state, np.array([[token]], np.int64))[0, -1]

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling | None = None,
        state: OrtState | None = None,
        stop: Sequence[int] = (),
        on_logits: Callable[[np.ndarray], None] | None = None,
    ) -> Iterator[int]:
        """Token after token: `runtime_ref.sampling.continue_tokens`."""
        return continue_tokens(self, prompt, max_tokens, sampling, state, stop, on_logits)

    def _step(self, state: OrtState, ids: np.ndarray) -> np.ndarray:
        """One token for each text, with bindings that are made once: binding anew would take a millisecond a token."""
        import onnxruntime as ort

        if state.current not in state.decoders:
            binding = self.session.io_binding()
            step = ort.OrtValue.ortvalue_from_numpy(ids)
            shape = (state.batch, 1, self.config.vocab_size)
            logits = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
            binding.bind_ortvalue_input("input_ids", step)
            binding.bind_ortvalue_output("logits", logits)
            state.bind(binding)
            state.decoders[state.current] = (binding, step, logits)
        else:
            state.bind_growing(state.decoders[state.current][0])
        binding, step, logits = state.decoders[state.current]
        step.update_inplace(ids)
        self._run(binding)
        state.advance(binding)
        return np.array(logits.numpy())

    def _check_inputs(self) -> None:
        """The graph has the inputs that its metadata promises, so that a run cannot fail on a shape."""
        wanted: dict[str, list[Any]] = {"input_ids": ["batch", "time"]}
        wanted |= {state.past: state.dims("past") for state in self._states}
        found = {value.name: value.shape for value in self.session.get_inputs()}
        for name in wanted | found:
            if wanted.get(name) != found.get(name):
                raise OnnxError(f"{self.path}: the input {name} is {found.get(name)}, but the metadata says {wanted.get(name)}")  # fmt: skip

    def _run(self, binding: Any) -> None:
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors share no base of their own
            raise OnnxError(f"{self.path}: onnxruntime cannot run it: {_one_line(error)}") from None
        finally:
            if self.kernels:
                from runtime_ref.ort.custom_ops import raise_failure

                raise_failure()


def _mapped(path: Path, options: Any) -> bytes:
    """The file's graph, with larger nodes; its weights are mapped, and released when the kernels have them in their own layout."""
    from runtime_ref.ort.fused import with_blocks
    from runtime_ref.ort.mapped import without_weights

    real = path.resolve()  # onnxruntime follows no links to weights
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(real.parent))
    return with_blocks(without_weights(real))


def _return_memory() -> None:
    """Give what loading freed (the file as protobuf, 40 % of its size and more) back to the system: glibc would keep it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
