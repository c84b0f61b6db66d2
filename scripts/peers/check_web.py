"""Open a folder written by `tmexport web` in a headless browser, generate text, and compare with runtime_ref.

    python scripts/peers/check_web.py SITE --prompt "Fellow citizens" --screenshot docs/web.png

A page that runs a GGUF must give the tokens and the digest of logits of runtime_ref's profile `exact`, one that runs ONNX those
of OrtModel. Then the page is opened again and continues the kept text, and a third time without its server.
The last line on stdout is one JSON object; the exit code is 0 if all of it is as it should be.
"""

from __future__ import annotations

import functools
import http.server
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import click
from tokenizers import Tokenizer

from runtime_ref.gguf_source import gguf_source
from runtime_ref.model import Model
from runtime_ref.ort import OrtModel
from scripts.machines.logit_hashes import logits_digest
from scripts.peers.browsers import BROWSERS, Browser
from tmexport.cli.app import run_command

IDS = ["rate", "prefill", "position", "size", "memory", "all-memory", "state", "sha256", "text"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


class Site:
    """The folder behind an address of this machine; `close` leaves the page without its server."""

    def __init__(self, folder: Path) -> None:
        handler = functools.partial(Quiet, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}/"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@click.command()
@click.argument("site", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--browser", "name", type=click.Choice(list(BROWSERS)), default="chromium", show_default=True)
@click.option("--prompt", default="Fellow citizens", show_default=True)
@click.option("-n", "--tokens", "count", default=64, show_default=True)
@click.option("--screenshot", type=click.Path(path_type=Path))
@click.option("--seconds", default=300, show_default=True, help="How long the page may take.")
def check(site: Path, name: str, prompt: str, count: int, screenshot: Path | None, seconds: int) -> None:
    """Run SITE in a browser and compare its greedy continuation with runtime_ref's."""
    described = json.loads((site / "page.json").read_text())
    packed = described["engine"] == "packed"
    server, browser = Site(site), BROWSERS[name]()
    try:
        browser.open(server.address)
        wait(browser, seconds)
        loaded = browser.script("return performance.now()")
        press(browser, "go", seconds, prompt, count)
        if packed:
            press(browser, "digest", seconds)
        page, first = read(browser), tokens_of(browser)
        urls = browser.script("return performance.getEntriesByType('resource').map(e => e.name)")
        if screenshot:
            screenshot.write_bytes(browser.screenshot())
        browser.open(server.address)
        wait(browser, seconds)
        press(browser, "more", seconds, count=count)
        continued = tokens_of(browser)
        errors = browser.errors()
        server.close()
        browser.open(server.address)
        wait(browser, seconds)
        press(browser, "go", seconds, prompt, count)
        alone = tokens_of(browser)
    finally:
        browser.close()
    tokenizer = Tokenizer.from_file(str(site / "model.tokenizer.json"))
    wanted, digest = expected(site / described["model"], tokenizer.encode(prompt, add_special_tokens=False).ids, 2 * count, described["stop"])  # fmt: skip
    shown = {
        "tokens": len(first),
        "equal": first == wanted[:count],
        "text_equal": page["text"] == tokenizer.decode(first),
        "continued_equal": continued == wanted,
        "without_server_equal": alone == wanted[:count],
        "digest_equal": page["sha256"] == digest,
        "elsewhere": [url for url in urls if not url.startswith(server.address)],
        "console_errors": errors,
    }
    click.echo(json.dumps({"browser": name, "loaded_ms": round(loaded), **shown, **page}))
    good = all(value for key, value in shown.items() if key.endswith("equal"))
    sys.exit(0 if good and not shown["elsewhere"] and not errors else 1)


def expected(model: Path, prompt: list[int], count: int, stop: list[int]) -> tuple[list[int], str]:
    """The greedy continuation, and the digest that the page shows ("" for a page that shows none)."""
    if model.suffix == ".onnx":
        return list(OrtModel.load(model).generate(prompt, count, stop=stop)), ""
    exact = Model(gguf_source(model), "exact")
    found = list(exact.generate(prompt, count, stop=stop)), logits_digest(exact)
    exact.close()
    return found


def press(browser: Browser, button: str, seconds: int, prompt: str | None = None, count: int | None = None) -> None:
    """Press a button of the page, after filling in what is given, and wait until it is ready again."""
    for field, value in (("prompt", prompt), ("count", count)):
        if value is not None:
            browser.script("document.getElementById(arguments[0]).value = arguments[1]", field, value)
    browser.script("document.getElementById(arguments[0]).click()", button)
    wait(browser, seconds)


def read(browser: Browser) -> dict[str, str]:
    """What the page shows, by the names of its elements."""
    code = "return Object.fromEntries(arguments[0].map(i => [i, document.getElementById(i).textContent]))"
    found: dict[str, str] = browser.script(code, IDS)
    return found


def tokens_of(browser: Browser) -> list[int]:
    """The tokens that the page shows."""
    found: list[int] = json.loads(browser.script("return document.getElementById('output').dataset.tokens"))
    return found


def wait(browser: Browser, seconds: int) -> None:
    """Until the page is ready; its own error ends the wait."""
    end, text = time.monotonic() + seconds, ""
    while time.monotonic() < end:
        state: Any = browser.script(
            "const s = document.getElementById('status'); return [s.textContent, s.dataset.error]"
        )
        text, error = state
        if error == "true":
            raise click.ClickException(f"the page says: {text}")
        if text == "Ready":
            return
        time.sleep(0.1)
    raise click.ClickException(f"the page still says {text!r} after {seconds} s")


if __name__ == "__main__":
    run_command(check, "scripts/peers/check_web.py")
