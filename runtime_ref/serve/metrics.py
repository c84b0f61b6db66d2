"""What Prometheus may ask: requests, tokens, what is running, and how long it takes."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        r = self._registry
        self._requests = Counter("tmexport_requests", "Answered requests.", ["path", "status"], registry=r)
        self._prompt = Counter("tmexport_prompt_tokens", "Tokens of prompts.", registry=r)
        self._cached = Counter("tmexport_cached_tokens", "Tokens of prompts that a snapshot had.", registry=r)
        self._made = Counter("tmexport_generated_tokens", "Tokens made.", registry=r)
        self._first = Histogram("tmexport_first_token_seconds", "From request to first logits.", registry=r, buckets=_SECONDS)  # fmt: skip
        self._step = Histogram(
            "tmexport_step_seconds", "One pass over the running texts.", registry=r, buckets=_SECONDS
        )
        self._running = Gauge("tmexport_running", "Prompts being read and texts being made.", registry=r)
        self._waiting = Gauge("tmexport_waiting", "Prompts in the queue.", registry=r)

    def watch(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Where to read what is running and waiting."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)

    def request(self, path: str, status: int) -> None:
        """An answered request."""
        self._requests.labels(path, status).inc()

    def prompt(self, tokens: int, cached: int) -> None:
        """A prompt that begins."""
        self._prompt.inc(tokens)
        self._cached.inc(cached)

    def first_token(self, seconds: float) -> None:
        """A prompt's first logits."""
        self._first.observe(seconds)

    def token(self) -> None:
        """A token of a text."""
        self._made.inc()

    def step(self, seconds: float) -> None:
        """A pass over the running texts."""
        self._step.observe(seconds)

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self._registry)
