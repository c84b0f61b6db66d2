"""Model: a low-bit state-space model, hybrid or Transformer that runs. `State` is what it remembers of one text; one model serves many states.

model = Model.load("model.gguf")
state = model.new_state()
logits = model.prefill(state, tokens)      # fp32 [vocab], after the last token
logits = model.decode(state, token)        # the same bits as if `token` had been part of the prefill
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from runtime_ref.arithmetic import DEFAULT, preset_of
from runtime_ref.errors import NumericsError, StateError
from runtime_ref.gguf_source import gguf_source
from runtime_ref.kernels.build import Built, build
from runtime_ref.kernels.phases import FEWEST_ROWS
from runtime_ref.kernels.program import Job, Program, run
from runtime_ref.kernels.records import words
from runtime_ref.kernels.replay import Replay, programs
from runtime_ref.kernels.scratch import CHUNK, Scratch, allocate
from runtime_ref.sampling import Sampling, Take, continue_tokens
from runtime_ref.speculative import Costs, Drafts
from runtime_ref.state import State, state_arrays, with_positions
from runtime_ref.team import Team
from runtime_ref.weights import Source
from tmexport.errors import UsageError
from tmexport.model import Model as Config
from tmexport.model.rope import context_limit
from tmexport.threads import default_threads


class Model:
    """Weights in the kernels' layout, a profile, and a team of threads. Calls from several threads take turns."""

    def __init__(self, source: Source, profile: str = DEFAULT, threads: int | None = None) -> None:
        self.preset = preset_of(profile)
        if threads is not None and not 1 <= threads <= 1024:
            raise UsageError(f"{threads} threads; expected 1 to 1024")
        self.config: Config = source.config
        self.profile = profile
        self._built: Built = build(source, self.preset)
        self._state_arrays = state_arrays(source.config, self.preset)
        self._team = Team(threads or default_threads())
        self._lock = threading.Lock()
        self._scratch: Scratch = allocate(1, self._built.room)
        self._scores = np.zeros((0, 0), np.float32)
        self._tries: tuple[Replay, State] | None = None
        self.costs = Costs()

    @classmethod
    def load(cls, path: Path | str, profile: str = DEFAULT, threads: int | None = None) -> Model:
        """The model in a GGUF file.

        Raises:
            GGUFError: the file is damaged, or has layers or types that this runtime does not compute.
            UsageError: an unknown profile, or a number of threads that cannot be.
        """
        return cls(gguf_source(path), profile, threads)

    @property
    def threads(self) -> int:
        return self._team.size

    @threads.setter
    def threads(self, number: int) -> None:
        if not 1 <= number <= 1024:
            raise UsageError(f"{number} threads; expected 1 to 1024")
        with self._lock:
            self._team.close()
            self._team = Team(number)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that decoding one token reads (of an untied embedding, one row)."""
        return self._built.weight_bytes

    @property
    def fingerprint(self) -> str:
        """Identifies the weights, whatever container they came from."""
        return self._built.fingerprint

    def compile(self, tokens: int = CHUNK) -> None:
        """Compile the kernels for prompts of so many tokens, or load them from the cache; otherwise the first call does it."""
        one, rows = np.zeros(1, np.int64), min(tokens, CHUNK)
        with self._lock:
            job = self._job(one, np.zeros((1, 1), np.uint64), 1, np.zeros((1, 1), np.float32), [self.new_state()])
            for number in {1, rows}:
                self._table(self._built.program, job._replace(rows=number))

    def new_state(self) -> State:
        """The state before the first token."""
        arrays = {array.name: np.zeros(with_positions(array, 0), array.dtype) for array in self._state_arrays}
        growing = frozenset(array.name for array in self._state_arrays if array.grows)
        return State(arrays, 0, self.fingerprint, self.profile, growing)

    def load_state(self, path: Path | str) -> State:
        """A state saved by `State.save`.

        Raises:
            StateError: the file is damaged, or belongs to another model or profile.
        """
        return State.load(path, self.new_state())

    def decode(self, state: State, token: int) -> np.ndarray:
        """Logits fp32 [vocab] after one more token; the state is updated.

        Raises:
            UsageError: the token is outside the vocabulary, or the text longer than the context of a model with attention.
            NumericsError: an Inf or a NaN appeared; the layer is named, and the state is no longer meaningful.
        """
        return self._forward([state], _ids([token]).reshape(1, 1), all_logits=False)[0]

    def decode_batch(self, states: Sequence[State], tokens: Sequence[int]) -> np.ndarray:
        """One token for each of several different states, sharing one pass over the weights; logits [states, vocab].

        Raises: as `decode`; ValueError for a state that occurs twice or a length mismatch.
        """
        if not len(states) or len({id(s) for s in states}) != len(states) or len(states) != len(tokens):
            raise ValueError("expected distinct states and one token for each")
        return self._forward(list(states), _ids(tokens).reshape(-1, 1), all_logits=False)

    def prefill(
        self, state: State, tokens: Sequence[int], on_progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Logits fp32 [vocab] after the last of `tokens` (at least one); the state is updated.

        Raises: as `decode`.
        """
        ids = _ids(tokens)
        if not len(ids):
            raise UsageError("the prompt has no tokens; expected at least one")
        self._check_context(state, len(ids))
        logits = np.zeros(0, np.float32)
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            logits = self._forward([state], part[None], all_logits=False)[0]
            if on_progress:
                on_progress(len(part))
        return logits

    def advance(self, state: State, token: int, draft: Sequence[int], take: Take) -> int | None:
        """Read a token, and of what may follow it as much as turns out to: like as many calls of `decode`, in one pass.

        Args:
            state: is updated by the tokens that were read.
            token: comes next.
            draft: what may come after it; what goes beyond the context length is left out.
            take: called with the logits fp32 [vocab] after each token that was read; returns which one follows, None to end.
                That one is read if the draft foresaw it.

        Returns: what `take` returned last; it has not been read.

        Raises: as `decode`; a draft that does not come true raises nothing.
        """
        fits = context_limit(self.config.context_length) - state.tokens - 1 if state.growing else len(draft)
        ids = _ids([token, *draft[: max(0, fits)]])
        with self._lock:
            self._prepare([state], ids[None])
            tries, self._tries = self._tries_for(len(ids)), None
            replay, spare = tries
            addresses = self._addresses([state])
            replay.origin[:] = addresses[:, 0]
            copies = self._addresses([dataclasses.replace(state, arrays=state.arrays | spare.arrays)])
            logits = self._pass(replay.trial, [state], ids[None], copies, all_logits=True)
            self._check(logits[:1], 1)
            sound = (self._scratch.bad[: len(ids)] < 0) & np.isfinite(logits).all(axis=1)
        read, following = 1, take(logits[0])
        while read < len(ids) and sound[read] and following == ids[read]:
            following = take(logits[read])
            read += 1
        if read == len(ids):
            for name in spare.arrays:
                state.arrays[name], spare.arrays[name] = spare.arrays[name], state.arrays[name]
        with self._lock:
            if read < len(ids) and replay.replay is not None:
                self._pass(replay.replay, [state], ids[None, :read], addresses, all_logits=False)
            self._tries = tries
        state.tokens = state.extent.end = state.tokens + read
        return following

    def _tries_for(self, tokens: int) -> tuple[Replay, State]:
        """The programs for drafts, and a state to try them on, which belong to one call at a time."""
        if self._tries is not None and self._tries[0].rows >= tokens:
            return self._tries
        spare = self.new_state()
        for name in spare.growing:
            del spare.arrays[name]
        return programs(self._built.steps, self._state_arrays, -(-tokens // 16) * 16), spare

    def score(self, state: State, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        """Logits after every token, fp32 [chunk, vocab] at a time; the state is updated.

        Raises: as `decode`.
        """
        ids = _ids(tokens)
        self._check_context(state, len(ids))
        for start in range(0, len(ids), CHUNK):
            yield self._forward([state], ids[None, start : start + CHUNK], all_logits=True)

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling | None = None,
        state: State | None = None,
        stop: Sequence[int] = (),
        on_logits: Callable[[np.ndarray], None] | None = None,
    ) -> Iterator[int]:
        """Token after token, several at once where the text repeats itself: `sampling.continue_tokens`."""
        read = Drafts(self, self.costs, prompt).read
        return continue_tokens(self, prompt, max_tokens, sampling, state, stop, on_logits, read)

    def close(self) -> None:
        """End the threads."""
        self._team.close()

    def _forward(self, states: list[State], tokens: np.ndarray, all_logits: bool) -> np.ndarray:
        """tokens [sequences, length] -> logits [sequences, vocab], or [sequences * length, vocab]."""
        with self._lock:
            self._prepare(states, tokens)
            logits = self._pass(self._built.program, states, tokens, self._addresses(states), all_logits)
            self._check(logits, tokens.size)
        for state in states:
            state.tokens += tokens.shape[1]
        return logits

    def _prepare(self, states: Sequence[State], tokens: np.ndarray) -> None:
        """Refuse tokens and states that cannot be read, and make room for the others."""
        vocab = self.config.vocab_size
        outside = (tokens < 0) | (tokens >= vocab)
        if outside.any():
            raise UsageError(f"token {tokens[outside][0]} is outside the vocabulary of {vocab}")
        for state in states:
            if state.model != self.fingerprint or state.profile != self.profile:
                raise StateError("the state belongs to another model or profile")
            state.check(self._state_arrays)
        for state in states:
            self._check_context(state, tokens.shape[1])
        for state in states:
            state.make_room(state.tokens + tokens.shape[1])

    def _addresses(self, states: Sequence[State]) -> np.ndarray:
        """Of the states' arrays, uint64 [arrays, sequences]."""
        found = [[state.arrays[array.name].ctypes.data for state in states] for array in self._state_arrays]
        return np.array(found, np.uint64).reshape(-1, len(states))

    def _pass(
        self, program: Program, states: Sequence[State], tokens: np.ndarray, addresses: np.ndarray, all_logits: bool
    ) -> np.ndarray:
        """Run a program, whose phases find the states at the addresses; logits as `_forward`'s, if it makes any."""
        sequences, length = tokens.shape
        if len(self._scratch.x) < tokens.size:
            self._scratch = allocate(tokens.size, self._built.room)
        logits = np.empty((tokens.size if all_logits else sequences, self.config.vocab_size), np.float32)
        job = self._job(tokens.reshape(-1), addresses, length, logits, states)
        table, record = self._table(program, job), np.array(list(words(job)), np.uint64)
        self._team.run(run, table, record.ctypes.data)
        return logits

    def _check(self, logits: np.ndarray, rows: int) -> None:
        bad = self._scratch.bad[:rows]
        if (bad >= 0).any():
            layer = int(bad[bad >= 0].min())
            where = f"layer {layer - 1}" if layer else "the embedding"
            raise NumericsError(
                f"an Inf or a NaN appears in the output of {where}; the weights or the state are damaged"
            )
        if not np.isfinite(logits).all():
            raise NumericsError("an Inf or a NaN appears in the output of the head; the weights are damaged")

    def _check_context(self, state: State, length: int) -> None:
        limit = context_limit(self.config.context_length)
        if state.growing and state.tokens + length > limit:
            raise UsageError(
                f"the text has {state.tokens + length} tokens, but the model was made for {limit} (its context length)"
            )

    def _job(
        self, tokens: np.ndarray, addresses: np.ndarray, length: int, logits: np.ndarray, states: Sequence[State]
    ) -> Job:
        """tokens int64 [sequences * length], addresses uint64 [arrays, sequences], logits [sequences or all tokens, vocab]."""
        past, room = (np.array(values, np.int64) for values in ([s.tokens for s in states], [s.room for s in states]))
        width = 16 * (-(-int(room.max()) // 16) * 16 + 16)
        if self._scores.shape[0] != self.threads or self._scores.shape[1] < width:
            self._scores = np.zeros((self.threads, width), np.float32)
        shape = (len(tokens), len(tokens) // length, length, len(logits))
        return Job(*shape, tokens, addresses, logits, past, room, self._scores, self._scratch)

    def _table(self, program: Program, job: Job) -> np.ndarray:
        """The code for many rows has to be compiled only for prompts that are longer than that takes."""
        many = job.rows >= FEWEST_ROWS and (job.rows >= CHUNK or program.at_hand(True, job))
        return program.table(many, job)


def _ids(tokens: Sequence[int]) -> np.ndarray:
    """Token ids as int64 [n]; a fraction is not rounded, a number too large does not wrap."""
    ids = np.asarray(tokens)
    if ids.size and ids.dtype.kind not in "iu":
        raise UsageError(f"tokens are {ids.dtype}; expected whole numbers")
    if ids.dtype == np.uint64 and ids.size and ids.max() >= 2**63:
        raise UsageError(f"token {ids.max()} is outside the vocabulary")
    return ids.astype(np.int64).reshape(-1)
