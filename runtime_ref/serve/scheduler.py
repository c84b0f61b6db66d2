"""The one thread that runs the model. Everyone's prompts are read in turn, a slice at a time, and everyone's texts grow
together, a token at a time; works join and leave between tokens. None of it shows in the bits of the logits.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from runtime_ref.model import Model
from runtime_ref.serve.choice import Choice, Finished, Piece, Scored, score
from runtime_ref.serve.fields import BadRequest
from runtime_ref.serve.metrics import Metrics
from runtime_ref.serve.prefix_cache import PrefixCache
from runtime_ref.speculative import Drafts
from runtime_ref.state import State
from tmexport.errors import TmexportError

SLICE = 64  # prompt tokens between two tokens of the texts: one chunk of the kernels


@dataclass(frozen=True)
class Read:
    """The prompt has been read. cached: tokens of it that a snapshot had; scored: each of its tokens, if asked for."""

    cached: int
    scored: tuple[Scored, ...]


@dataclass(frozen=True)
class Failed:
    """The work ends without an answer."""

    error: TmexportError


Event = Read | Piece | Finished | Failed


@dataclass(eq=False)
class Work:
    """One prompt and the texts to make from it.

    prompt: token ids, at least one. choices: at least one. emit: takes the events, in the scheduler's thread, and must
    not wait. deadline: of time.monotonic(). boundaries: numbers of prompt tokens at which a snapshot is worth keeping.
    score_top: report the log-probability of every prompt token, with so many likeliest ones; None: do not.
    """

    prompt: list[int]
    choices: list[Choice]
    emit: Callable[[Event], None]
    deadline: float
    boundaries: tuple[int, ...] = ()
    score_top: int | None = None
    cancelled: bool = False
    born: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Reading:
    work: Work
    state: State
    at: int
    cached: int
    logits: np.ndarray | None = None
    scored: list[Scored] = field(default_factory=list)


@dataclass(eq=False)
class _Writing:
    work: Work
    choice: Choice
    state: State
    logits: np.ndarray  # that the last token was chosen from
    drafts: Drafts


class Scheduler:
    """Runs works, at most `slots` texts at a time; further ones wait in order."""

    def __init__(self, model: Model, cache: PrefixCache, metrics: Metrics, slots: int, queue: int) -> None:
        self._model, self._cache, self._metrics = model, cache, metrics
        self.slots, self._longest = slots, queue
        self._waiting: deque[Work] = deque()
        self._reading: deque[_Reading] = deque()
        self._writing: list[_Writing] = []
        self._wake, self._closed = threading.Condition(), False
        metrics.watch(lambda: len(self._writing) + len(self._reading), lambda: len(self._waiting))
        self._thread = threading.Thread(target=self._run, daemon=True, name="tmexport-serve")
        self._thread.start()

    def submit(self, works: list[Work]) -> None:
        """Queue the works of a request, all or none.

        Raises:
            BadRequest: the queue is full (429), or a work has more choices than there are slots.
        """
        most = max(len(work.choices) for work in works)
        if most > self.slots:
            raise BadRequest(f"asks for {most} texts of one prompt; this server makes at most {self.slots} at a time")
        with self._wake:
            if self._closed:
                raise BadRequest("the server is closing", 503)
            free = max(0, self.slots - self._used())
            if len(self._waiting) + len(works) > self._longest + free:
                raise BadRequest(f"{len(self._waiting)} requests are waiting already; try again later", 429)
            self._waiting.extend(works)
            self._wake.notify()

    def close(self) -> None:
        """End the thread; works that are not done fail."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._waiting or self._reading or self._writing)
                if self._closed:
                    break
                self._admit()
            self._leave()
            if self._reading:
                self._read()
            if self._writing:
                self._write()
        gone = [*self._waiting, *(r.work for r in self._reading), *(w.work for w in self._writing)]
        for work in dict.fromkeys(gone):
            work.emit(Failed(BadRequest("the server is closing", 503)))

    def _used(self) -> int:
        return len(self._writing) + sum(len(r.work.choices) for r in list(self._reading))

    def _admit(self) -> None:
        """Begin the works at the head of the queue for which there are slots."""
        used = self._used()
        while self._waiting and (self._waiting[0].cancelled or used + len(self._waiting[0].choices) <= self.slots):
            work = self._waiting.popleft()
            if work.cancelled:
                continue
            used += len(work.choices)
            hit = None if work.score_top is not None else self._cache.find(work.prompt)
            if hit is None:
                reading = _Reading(work, self._model.new_state(), 0, 0)
            else:
                reading = _Reading(work, hit.state, hit.length, hit.length, hit.logits)
            self._metrics.prompt(len(work.prompt), reading.cached)
            self._reading.append(reading)

    def _leave(self) -> None:
        """Drop what nobody waits for; end what has had its time."""
        now = time.monotonic()
        self._reading = deque(r for r in self._reading if not r.work.cancelled)
        self._writing = [w for w in self._writing if not w.work.cancelled]
        with self._wake:
            late = [work for work in self._waiting if work.deadline < now]
            self._waiting = deque(w for w in self._waiting if not (w.cancelled or w.deadline < now))
        for work in (*late, *(r.work for r in self._reading if r.work.deadline < now)):
            self._fail(work, BadRequest("the server did not get to the answer in the time of a request", 503))
        for text in [w for w in self._writing if w.work.deadline < now]:
            self._finish(text, text.choice.end("length"))

    def _fail(self, work: Work, error: Exception) -> None:
        self._reading = deque(r for r in self._reading if r.work is not work)
        self._writing = [w for w in self._writing if w.work is not work]
        if not isinstance(error, TmexportError):
            error = TmexportError(f"unexpected {type(error).__name__}: {error}")
        work.cancelled = True
        work.emit(Failed(error))

    def _read(self) -> None:
        """One slice of the prompt whose turn it is."""
        reading = self._reading.popleft()
        work = reading.work
        try:
            if reading.at < len(work.prompt):
                self._slice(reading)
            if reading.at < len(work.prompt):
                self._reading.append(reading)
            else:
                self._begin(reading)
        except Exception as error:
            self._fail(work, error)

    def _slice(self, reading: _Reading) -> None:
        work, start = reading.work, reading.at
        stops = (*work.boundaries, start // self._cache.every * self._cache.every + self._cache.every)
        end = min(start + SLICE, len(work.prompt), *(stop for stop in stops if stop > start))
        part = work.prompt[start:end]
        if work.score_top is None:
            reading.logits = self._model.prefill(reading.state, part)
        else:
            logits = np.concatenate(list(self._model.score(reading.state, part)))
            reading.scored += [] if start else [Scored(part[0], None, None)]
            targets = work.prompt[start + 1 : end + 1]
            reading.scored += score(logits[: len(targets)], targets, work.score_top)
            reading.logits = logits[-1]
        reading.at = end
        if end in stops or end == len(work.prompt):
            self._cache.put(work.prompt[:end], reading.state, reading.logits)

    def _begin(self, reading: _Reading) -> None:
        """From a prompt that has been read to its texts."""
        work, logits = reading.work, reading.logits
        assert logits is not None
        work.emit(Read(reading.cached, tuple(reading.scored)))
        self._metrics.first_token(time.monotonic() - work.born)
        for number, choice in enumerate(work.choices):
            last = number + 1 == len(work.choices)
            state = reading.state if last else reading.state.copy()
            text = _Writing(work, choice, state, logits, Drafts(self._model, self._model.costs, work.prompt))
            self._writing.append(text)
            if choice.reason:
                self._finish(text, None)
            else:
                self._choose(text, logits)

    def _write(self) -> None:
        """One more token for every text; for one that is alone several, where it repeats itself."""
        texts, began = list(self._writing), time.monotonic()
        try:
            if len(texts) == 1:
                self._write_alone(*texts)
            else:
                self._write_together(texts)
        except Exception as error:
            for work in dict.fromkeys(t.work for t in texts):
                self._fail(work, error)
        self._metrics.step(time.monotonic() - began)

    def _write_together(self, texts: list[_Writing]) -> None:
        rows = self._model.decode_batch([t.state for t in texts], [t.choice.tokens[-1] for t in texts])
        for text, logits in zip(texts, rows, strict=True):
            if text.work.cancelled:  # a text of the same work failed
                continue
            text.drafts.note(text.choice.tokens[-1])
            try:
                self._choose(text, logits)
            except Exception as error:
                self._fail(text.work, error)

    def _write_alone(self, text: _Writing) -> None:
        last: Piece | None = None

        def take(logits: np.ndarray) -> int | None:
            nonlocal last
            last = self._step(text, logits)
            return None if text.choice.reason or text.work.cancelled else text.choice.tokens[-1]

        text.drafts.read(text.state, text.choice.tokens[-1], text.choice.left - 1, take)
        if text.choice.reason:
            self._finish(text, last)

    def _choose(self, text: _Writing, logits: np.ndarray) -> None:
        piece = self._step(text, logits)
        if text.choice.reason:
            self._finish(text, piece)

    def _step(self, text: _Writing, logits: np.ndarray) -> Piece | None:
        """Choose a token; what it adds to the text is said at once, or returned if it was the last."""
        text.logits = logits
        piece = text.choice.step(logits)
        self._metrics.token()
        if text.choice.reason:
            return piece
        if piece is not None:
            text.work.emit(piece)
        return None

    def _finish(self, text: _Writing, piece: Piece | None) -> None:
        self._writing.remove(text)
        made = text.choice.tokens
        if len(made) > 1:  # the state has read all but the last of them
            self._cache.put([*text.work.prompt, *made[:-1]], text.state, text.logits)
        if piece is not None:
            text.work.emit(piece)
        text.work.emit(Finished(text.choice.index, text.choice.reason, len(made)))
