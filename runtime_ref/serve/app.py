"""The routes. Whatever is wrong with a request becomes a 4xx and one line; nothing a client does shows a traceback."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from runtime_ref.serve.answers import Answer
from runtime_ref.serve.bodies import Asked, Bodies
from runtime_ref.serve.choice import Choice
from runtime_ref.serve.fields import BadRequest, parse_object
from runtime_ref.serve.metrics import Metrics
from runtime_ref.serve.scheduler import Event, Failed, Scheduler, Work
from runtime_ref.serve.vocabulary import Vocabulary
from tmexport.cli.app import TRACEBACK
from tmexport.errors import one_line

PAGE = Path(__file__).parent / "page.html"
_BODY_SECONDS = 30.0
_LOCAL = {"localhost", "127.0.0.1", "[::1]"}


@dataclass(frozen=True)
class Limits:
    """body: bytes of a request. seconds: from a request to the end of its answer."""

    body: int = 8_000_000
    seconds: float = 600.0


@dataclass(frozen=True)
class Service:
    """What the routes need. key: that clients must show; local: only this machine may ask, under its own names."""

    name: str
    ends: tuple[int, ...]
    vocabulary: Vocabulary
    bodies: Bodies
    scheduler: Scheduler
    metrics: Metrics
    limits: Limits
    about: dict[str, Any]
    key: str | None = None
    local: bool = True


class Gone(Exception):
    """The client has left."""


def application(service: Service) -> Starlette:
    """The ASGI application of a service."""
    routes = _Routes(service)
    guard, key = routes.guard, routes.with_key
    return Starlette(
        routes=[
            Route("/", guard(routes.page)),
            Route("/health", guard(routes.health)),
            Route("/metrics", guard(key(routes.metrics))),
            Route("/v1/models", guard(key(routes.models))),
            Route("/v1/models/{name:path}", guard(key(routes.model))),
            Route("/v1/completions", guard(key(routes.completions)), methods=["POST"]),
            Route("/v1/chat/completions", guard(key(routes.chat)), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _http_error},
    )


Handler = Callable[[Request], Awaitable[Any]]


class _Routes:
    def __init__(self, service: Service) -> None:
        self._s = service
        self._created = int(time.time())

    def guard(self, handler: Handler) -> Handler:
        """Errors as answers, and every answer counted."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_host(request)
                response = await handler(request)
            except BadRequest as error:
                response = error_response(error)
            except (Gone, ClientDisconnect):
                response = Response(status_code=499)  # nobody reads it
            except Exception as error:
                response = error_response(_unexpected(error))
            self._s.metrics.request(request.scope["route"].path, response.status_code)
            return response

        return guarded

    def with_key(self, handler: Handler) -> Handler:
        """For those who show the key."""

        async def checked(request: Request) -> Response:
            if self._s.key is not None:
                shown = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
                if not hmac.compare_digest(shown.encode("latin-1"), self._s.key.encode()):
                    raise BadRequest("the API key is missing or wrong; send it as Authorization: Bearer KEY", 401)
            return await handler(request)

        return checked

    def _check_host(self, request: Request) -> None:
        """A web page elsewhere must not reach a local server under a name that it had resolved to this machine."""
        host = request.headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._s.local and name.lower() not in _LOCAL:
            raise BadRequest(f"the host {name!r} is not this machine's own name; start the server with --host", 403)

    async def page(self, request: Request) -> Response:
        headers = {"content-security-policy": "default-src 'self' 'unsafe-inline'; frame-ancestors 'none'"}
        return Response(PAGE.read_bytes(), media_type="text/html", headers=headers)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self._s.name, **self._s.about})

    async def metrics(self, request: Request) -> Response:
        return Response(self._s.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self._s.name:
            raise BadRequest(f"the model {request.path_params['name']!r} is not here; this server has {self._s.name!r}", 404, "model")  # fmt: skip
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self._s.name, "object": "model", "created": self._created, "owned_by": "tmexport"}

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, self._s.bodies.completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, self._s.bodies.chat)

    async def _answer(self, request: Request, read: Callable[[dict[str, Any]], Asked]) -> Response:
        deadline = time.monotonic() + self._s.limits.seconds
        body = await self._body(request)
        asked = await asyncio.to_thread(lambda: read(parse_object(body)))
        running = _Running(self._s, asked, deadline)
        try:
            first = await running.next(request.receive)
            if asked.stream:
                return _Stream(running, first)
            running.take(first)
            while not running.answer.done:
                running.take(await running.next(request.receive))
        except BaseException:
            running.cancel()
            raise
        return JSONResponse(running.answer.whole())

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":  # a form on a web page elsewhere cannot send this without asking first
            raise BadRequest(f"the content type is {kind!r}; expected application/json", 415)
        most, data = self._s.limits.body, bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    data += part
                    if len(data) > most:
                        raise BadRequest(f"the body has more than {most} bytes", 413)
        except TimeoutError:
            raise BadRequest(f"the body did not arrive within {_BODY_SECONDS:.0f} s", 408) from None
        return bytes(data)


class _Running:
    """A request's works in the scheduler, and their events."""

    def __init__(self, service: Service, asked: Asked, deadline: float) -> None:
        self.asked, self.answer = asked, Answer(asked, service.name, service.vocabulary)
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._gone: asyncio.Task[None] | None = None
        self._works = [self._work(service, number, deadline) for number in range(len(asked.prompts))]
        service.scheduler.submit(self._works)

    def _work(self, service: Service, number: int, deadline: float) -> Work:
        asked, loop = self.asked, asyncio.get_running_loop()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        choices = [
            Choice(
                number * asked.n + draw, service.vocabulary, asked.sampling, service.ends, asked.max_tokens, asked.stops,
                asked.top, draw, asked.constraint.copy() if asked.constraint else None,
            )
            for draw in range(asked.n)
        ]  # fmt: skip
        score_top = asked.top if asked.echo else None
        return Work(asked.prompts[number], choices, emit, deadline, asked.boundaries, score_top)

    def cancel(self) -> None:
        """Nobody waits any more."""
        for work in self._works:
            work.cancelled = True
        if self._gone is not None:
            self._gone.cancel()

    async def next(self, receive: Receive) -> tuple[int, Event]:
        """The next event.

        Raises:
            Gone: the client has left.
            BadRequest: the works failed.
        """
        self._gone = self._gone or asyncio.ensure_future(_until_gone(receive))
        if self._events.empty():
            waiting = asyncio.ensure_future(self._events.get())
            try:
                await asyncio.wait({waiting, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not waiting.done():
                    waiting.cancel()
            if not waiting.done():
                raise Gone
            found = waiting.result()
        else:
            found = self._events.get_nowait()
        if self._gone.done():
            raise Gone
        if isinstance(found[1], Failed):
            error = found[1].error
            raise error if isinstance(error, BadRequest) else BadRequest(str(error), 500)
        return found

    def take(self, event: tuple[int, Event]) -> Iterator[dict[str, Any]]:
        """Add an event to the answer; the chunks for it."""
        number, what = event
        assert not isinstance(what, Failed)
        return iter(list(self.answer.take(number, what)))


class _Stream(Response):
    """Server-sent events. The first event is there already, so that an early failure could still choose the status."""

    def __init__(self, running: _Running, first: tuple[int, Event]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._running, self._first = running, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(k, v) for k, v in self.raw_headers if k != b"content-length"]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for chunk in self._chunks(receive):
                data = b"data: " + (chunk if isinstance(chunk, bytes) else _json(chunk)) + b"\n\n"
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except Gone:
            pass
        finally:
            self._running.cancel()

    async def _chunks(self, receive: Receive) -> AsyncIterator[dict[str, Any] | bytes]:
        running, event = self._running, self._first
        try:
            while True:
                for chunk in running.take(event):
                    yield chunk
                if running.answer.done:
                    break
                event = await running.next(receive)
        except BadRequest as error:
            yield error_object(error)
            return
        if running.asked.usage:
            yield running.answer.last_chunk()
        yield b"[DONE]"


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def error_object(error: BadRequest) -> dict[str, Any]:
    """OpenAI's form of an error."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.field, "code": None}}


def error_response(error: BadRequest) -> Response:
    """An error as an answer; the connection ends with it, for what is left of its body is not read."""
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}.get(error.status, {})
    if error.status in (408, 413):
        headers = {"connection": "close"}
    return JSONResponse(error_object(error), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path}: {error.detail}"
    response = error_response(BadRequest(one_line(said), error.status_code))
    response.headers.update(error.headers or {})
    return response


def _unexpected(error: Exception) -> BadRequest:
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    text = one_line(f"unexpected {type(error).__name__}: {error}")
    print(f"error: {text}", file=sys.stderr, flush=True)
    return BadRequest(text, 500)
