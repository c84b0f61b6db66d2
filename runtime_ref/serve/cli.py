"""Serve a GGUF to programs that speak OpenAI's interface.

tmexport serve model.gguf
curl http://127.0.0.1:8080/v1/completions -H "Content-Type: application/json" -d '{"prompt": "Fellow citizens"}'
"""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

import click
import uvicorn

from runtime_ref.command import DEMO_MODEL, profile_option
from runtime_ref.memory import MemorySize
from runtime_ref.serve.app import Limits, Service, application
from runtime_ref.serve.bodies import Bodies
from runtime_ref.serve.metrics import Metrics
from runtime_ref.serve.prefix_cache import PrefixCache
from runtime_ref.serve.protocol import Connection
from runtime_ref.serve.scheduler import Scheduler
from runtime_ref.serve.vocabulary import load_speaker
from tmexport.chat_template import load_template
from tmexport.cli.options import HELP, PATH, threads_option
from tmexport.errors import UsageError
from tmexport.evidence import file_digest


@click.command(context_settings=HELP)
@click.argument("model_path", metavar="[MODEL]", default=DEMO_MODEL, type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--api-key", envvar="TMEXPORT_API_KEY", show_envvar=True, help="What clients must show. Better in the environment: others see a command line.")  # fmt: skip
@click.option("--chat-template", type=PATH, help="A jinja file. Default: the template in the file.")
@threads_option
@profile_option
@click.option("--parallel", type=click.IntRange(1, 256), default=8, show_default=True, help="Texts made at a time.")
@click.option("--queue", type=click.IntRange(0), default=128, show_default=True, help="Prompts that may wait; further ones get a 429.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(1), default=65536, show_default=True, help="Of a prompt and its answer together.")  # fmt: skip
@click.option("--max-body", type=MemorySize(), default="8M", show_default=True, help="Of a request.")
@click.option("--timeout", type=click.FloatRange(0.1), default=600.0, show_default=True, help="Seconds for a request; a text that is not done then ends there.")  # fmt: skip
@click.option("--cache-size", type=MemorySize(), default="512M", show_default=True, help="For states of prompts already read, in memory; with --cache-dir as much again on disk.")  # fmt: skip
@click.option("--cache-dir", type=PATH, help="A folder for these states, which then outlive the server.")
def serve(
    model_path: Path,
    host: str,
    port: int,
    api_key: str | None,
    chat_template: Path | None,
    threads: int | None,
    profile: str,
    parallel: int,
    queue: int,
    max_tokens: int,
    max_body: int,
    timeout: float,
    cache_size: int,
    cache_dir: Path | None,
) -> None:
    """Serve MODEL, a .gguf file, over HTTP as OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models.

    Also a page to chat (/), /health, and /metrics for Prometheus. Without MODEL: the demo model.

    \b
    Examples:
      tmexport serve model.gguf
      tmexport serve model.gguf --port 8081 --cache-dir ~/.cache/tmexport-states
    """
    if api_key == "":
        raise UsageError("the API key is empty; give one, or leave the option out")
    listening = _listen(host, port)
    template = load_template(model_path, chat_template)
    model, vocabulary, ends = load_speaker(model_path, profile, threads)
    local = _is_local(host)
    cache = PrefixCache(model.new_state(), model.config.vocab_size, file_digest(model_path), cache_size, cache_dir)
    metrics = Metrics()
    scheduler = Scheduler(model, cache, metrics, parallel, queue)
    bodies = Bodies(model_path.stem, vocabulary, ends, template, max_tokens)
    service = Service(
        model_path.stem, ends, vocabulary, bodies, scheduler, metrics, Limits(max_body, timeout),
        {"chat": template is not None, "profile": profile, "threads": model.threads}, api_key, local,
    )  # fmt: skip
    where = listening.getsockname()
    click.echo(f"{model_path.stem} at http://{f'[{where[0]}]' if ':' in where[0] else where[0]}:{where[1]}", err=True)
    if not local and api_key is None:
        click.echo("warning: anyone who reaches this address may use it; --api-key asks for a key", err=True)
    try:
        _run(service, listening)
    finally:
        scheduler.close()
        cache.close()


def _run(service: Service, listening: socket.socket) -> None:
    config = uvicorn.Config(
        application(service), http=Connection, ws="none", lifespan="off", log_level="critical", access_log=False,
        server_header=False, timeout_keep_alive=30, timeout_graceful_shutdown=3, limit_concurrency=1024,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        listening = socket.socket(family, kind)
        if os.name == "posix":  # on Windows it would let two servers have one port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        raise UsageError(f"cannot listen at {host} port {port}: {error.strerror or error}") from None
    return listening


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
