"""A server under load and under abuse: it answers, it refuses in one line, it forgets nobody's memory, its cache stays whole.

    python scripts/faults/serve_load.py [MODEL.gguf] --seconds 120

Five parts, each with a server process of MODEL (default: the demo model): (1) how many tokens a second one client gets and eight together;
(2) --clients clients at once for --seconds, an eighth of them reading slowly, an eighth leaving in the middle, an eighth
half-closing their connection; (3) --bad wrong requests; (4) --random random bodies; (5) --kills times kill -9 on a server
that is writing its cache folder, after which every snapshot there must read. The last line on stdout is one JSON object;
the exit code is 0 if nothing of that failed.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from runtime_ref.command import DEMO_MODEL
from tests.serve.running import TEMPLATE, Server, request_bytes
from tmexport.cli.app import run_command
from tmexport.cli.options import PATH

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WORDS = [
    "the",
    "state",
    "of",
    "the",
    "Union",
    "army",
    "navy",
    "treasury",
    "peace",
    "commerce",
    "Congress",
    "citizens",
    "public",
    "lands",
    "foreign",
    "nations",
]
ALLOWED_KB = 20_000  # that a server may grow by in the second half of the load, when its cache is full


@dataclass
class Seen:
    """What the clients saw. gaps: seconds between pieces of a text; errors: what should not have been."""

    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    answers: int = 0
    errors: list[str] = field(default_factory=list)


def prompt(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


async def stream(server: Server, body: dict[str, Any], kind: str, seen: Seen) -> None:
    """One streamed completion, read as a client of this kind does."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        writer.write(request_bytes(COMPLETIONS, {**body, "stream": True, "stream_options": {"include_usage": True}}))
        await writer.drain()
        if kind == "half-closed":
            writer.write_eof()
        last, status = time.monotonic(), await reader.readline()
        if kind != "half-closed" and b" 200 " not in status:
            seen.errors.append(f"{kind}: {status!r}")
            return
        pieces = 0
        while line := await reader.readline():
            now = time.monotonic()
            if line.startswith(b"data: [DONE]"):
                seen.answers += 1
                return
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                seen.errors.append(f"{kind}: {event}")
                return
            if event.get("usage"):
                seen.tokens += event["usage"]["completion_tokens"]
            elif event["choices"][0]["text"] and kind == "plain":
                if pieces:
                    seen.gaps.append(now - last)
                last, pieces = now, pieces + 1
            if kind == "leaving" and pieces + 1 > 3:
                return
            if kind == "slow":
                await asyncio.sleep(0.05)
        if kind in ("plain", "slow"):
            seen.errors.append(f"{kind}: the stream ended early")
    finally:
        writer.close()


async def client(server: Server, number: int, until: float, seen: Seen, words: int = 60) -> None:
    """Ask again and again. The kinds: of eight, one reads slowly, one leaves, one half-closes."""
    rng = random.Random(number)
    kind = {5: "slow", 6: "leaving", 7: "half-closed"}.get(number % 8, "plain")
    while time.monotonic() < until:
        body = {"prompt": prompt(rng, rng.randrange(1, words)), "max_tokens": 48, "temperature": 0.8, "seed": number}
        try:
            await asyncio.wait_for(stream(server, body, kind, seen), 120)
        except (OSError, TimeoutError, ValueError) as error:
            seen.errors.append(f"{kind}: {type(error).__name__} {error}")
        await asyncio.sleep(0.005 if kind in ("plain", "slow") else 0.05)


def throughput(server: Server, clients: int, seconds: float) -> float:
    """Tokens a second of so many plain clients together."""

    async def run() -> float:
        seen, began = Seen(), time.monotonic()
        await asyncio.gather(*(client(server, 8 * i, began + seconds, seen, 3) for i in range(clients)))
        return seen.tokens / (time.monotonic() - began)

    return round(asyncio.run(run()), 1)


def memory_kb(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1])  # type: ignore[index]


def load(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    """Part 2."""
    seen = Seen()

    async def run() -> list[int]:
        began = time.monotonic()
        tasks = [asyncio.ensure_future(client(server, i, began + seconds, seen)) for i in range(clients)]
        await asyncio.sleep(seconds / 2)
        points = [memory_kb(server)]
        await asyncio.gather(*tasks)
        return [*points, memory_kb(server)]

    half, end = asyncio.run(run())
    p50, p99 = np.percentile(seen.gaps, [50, 99]) if seen.gaps else (0.0, 0.0)
    return {
        "clients": clients, "seconds": seconds, "answers": seen.answers, "errors": len(seen.errors), "first_errors": seen.errors[:3],
        "tokens_per_second": round(seen.tokens / seconds, 1), "p50_ms": round(float(p50) * 1e3, 2), "p99_ms": round(float(p99) * 1e3, 2),
        "memory_kb": end, "grown_kb": end - half, "still_running": settled(server),
    }  # fmt: skip


def settled(server: Server) -> int:
    """What still runs once everyone has gone, after at most ten seconds."""
    end = time.monotonic() + 10
    while (running := int(server.metric("tmexport_running"))) and time.monotonic() < end:
        time.sleep(0.1)
    return running


WRONG: list[Any] = [
    None,
    True,
    -1,
    1.5,
    2**70,
    "",
    "a",
    [],
    [[]],
    [None],
    {},
    {"type": "nope"},
    [-1],
    [[1], "a"],
    "\ud800",
    "x" * 2000,
]
FIELDS = ["prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream", "logprobs", "echo",
          "response_format", "grammar", "stream_options", "logit_bias", "tools", "best_of", "unknown", "model"]  # fmt: skip


def wrong(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A request with one or two fields replaced by what they cannot (or perhaps can) be."""
    path = rng.choice([COMPLETIONS, CHAT])
    good = {"prompt": "a"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "a"}]}
    return path, {**good, "max_tokens": 1} | {
        rng.choice(FIELDS): rng.choice(WRONG) for _ in range(rng.choice([1, 1, 2]))
    }


def abuse(server: Server, count: int, is_random: bool) -> dict[str, Any]:
    """Parts 3 and 4: statuses by number, and what was neither an answer nor one line that says what is wrong."""
    rng, statuses, failures = random.Random(count), dict[int, int](), []
    for _ in range(count):
        path, body = (
            wrong(rng) if not is_random else (rng.choice([COMPLETIONS, CHAT]), rng.randbytes(rng.randrange(300)))
        )
        try:
            status, text = server.ask("POST", path, body)
            statuses[status] = statuses.get(status, 0) + 1
            if status != 200:
                message = json.loads(text)["error"]["message"]
                if not 400 <= status < 500 or "\n" in message or "Traceback" in text:
                    failures.append(f"{body!r}: {status} {text}")
        except (OSError, ValueError, KeyError) as error:
            failures.append(f"{body!r}: {type(error).__name__} {error}")
    return {"asked": count, "statuses": statuses, "failures": len(failures), "first_failures": failures[:3]}


def kills(path: Path, count: int, folder: Path) -> dict[str, Any]:
    """Part 5."""
    from runtime_ref.model import Model
    from runtime_ref.serve.prefix_cache import PrefixCache, read_snapshot

    rng, answered = random.Random(5), 0
    for number in range(count):
        with Server(path, "--threads", 1, "--cache-dir", folder, "--cache-size", "100M") as server:
            connection = server.connect()
            for turn in range(8):
                body = {"prompt": [number + 1, turn + 1, *range(1, 1500)], "max_tokens": 1}
                connection.sendall(request_bytes(COMPLETIONS, body))
            connection.settimeout(rng.uniform(0.1, 0.9))  # snapshots are being written all that time
            try:
                while connection.recv(65536):
                    answered += 1
            except TimeoutError:
                pass
            server.stop(signal.SIGKILL)
            connection.close()
    model = Model.load(path, threads=1)
    blank, damaged = PrefixCache(model.new_state(), model.config.vocab_size, "", 10**8).blank, []
    snapshots = list(folder.glob("*.state"))
    for path in snapshots:
        key, length = path.stem.split("-")
        try:
            read_snapshot(path, key, int(length), blank)
        except (OSError, ValueError) as error:
            damaged.append(f"{path.name}: {error}")
    return {
        "kills": count,
        "snapshots": len(snapshots),
        "unfinished": len(list(folder.glob(".*.tmp"))),
        "damaged": len(damaged),
    }


@click.command()
@click.argument("path", metavar="[MODEL]", default=DEMO_MODEL, type=PATH)
@click.option("--clients", type=click.IntRange(1), default=32, show_default=True)
@click.option("--seconds", type=float, default=120.0, show_default=True, help="Of the load.")
@click.option("--bad", type=click.IntRange(0), default=1000, show_default=True, help="Wrong requests.")
@click.option(
    "--random", "random_bodies", type=click.IntRange(0), default=10_000, show_default=True, help="Random bodies."
)
@click.option("--kills", "times", type=click.IntRange(0), default=50, show_default=True, help="Times kill -9.")
@click.option("-t", "--threads", default=1, show_default=True, help="Of the server.")
def main(path: Path, clients: int, seconds: float, bad: int, random_bodies: int, times: int, threads: int) -> None:
    """Load, abuse and kill `tmexport serve` with MODEL, a .gguf file (default: the demo model)."""
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        template = Path(scratch) / "chat.jinja"
        template.write_text(TEMPLATE)
        with Server(path, "--chat-template", template, "--threads", threads, "--cache-size", "40M") as server:
            part = min(10.0, seconds / 4)
            one, eight = throughput(server, 1, part), throughput(server, 8, part)
            report["throughput"] = {"one": one, "eight": eight, "ratio": round(eight / one, 2)}
            for name, work in (
                ("load", lambda: load(server, clients, seconds)),
                ("bad", lambda: abuse(server, bad, False)),
                ("random", lambda: abuse(server, random_bodies, True)),
            ):
                report[name] = work()
                print(f"{name}: {report[name]}", file=sys.stderr)
            alive = server.ask("GET", "/health")[0] == 200
        report["alive"], report["traceback"] = alive, "Traceback" in server.stderr
        report["kills"] = kills(path, times, Path(scratch) / "cache") if times else {"kills": 0, "damaged": 0}
    failed = (
        report["load"]["errors"]
        + report["load"]["still_running"]
        + report["bad"]["failures"]
        + report["random"]["failures"]
    )
    failed += report["kills"]["damaged"] + report["traceback"] + (not alive) + (report["load"]["grown_kb"] > ALLOWED_KB)
    print(json.dumps(report | {"failed": int(failed)}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_command(main, "scripts/faults/serve_load.py")
