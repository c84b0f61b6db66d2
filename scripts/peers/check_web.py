"""Open a folder written by `tmexport web` in a headless Chromium, generate text, and compare with OrtModel.

    python scripts/peers/check_web.py SITE --prompt "Fellow citizens" --screenshot docs/web.png

Needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver). Speaks the WebDriver protocol itself.
The last line on stdout is one JSON object; the exit code is 0 if the page's tokens are OrtModel's.
"""

from __future__ import annotations

import base64
import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import click
from tokenizers import Tokenizer

from runtime_ref.ort import OrtModel
from tmexport.cli.app import run_command


class Browser:
    """One WebDriver session (W3C WebDriver) of a chromedriver that this object starts and ends."""

    def __init__(self, port: int) -> None:
        self._driver = subprocess.Popen(["chromedriver", f"--port={port}", "--silent"], stdout=subprocess.DEVNULL)
        self._base = f"http://127.0.0.1:{port}"
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=900,900",
            "--disable-dev-shm-usage",
        ]
        options = {"args": arguments}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        for _ in range(100):
            try:
                answer = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
                break
            except OSError:
                time.sleep(0.1)
        self._base += f"/session/{answer['sessionId']}"

    def _call(self, method: str, path: str, body: dict | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def script(self, code: str, *args: object) -> Any:
        return self._call("POST", "/execute/sync", {"script": code, "args": list(args)})

    def screenshot(self) -> bytes:
        return base64.b64decode(self._call("GET", "/screenshot"))

    def console(self) -> list[dict]:
        return self._call("POST", "/se/log", {"type": "browser"})

    def close(self) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(10)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@click.command()
@click.argument("site", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--prompt", default="Fellow citizens", show_default=True)
@click.option("-n", "--tokens", "count", default=64, show_default=True)
@click.option("--screenshot", type=click.Path(path_type=Path))
@click.option("--seconds", default=300, show_default=True, help="How long the page may take.")
def check(site: Path, prompt: str, count: int, screenshot: Path | None, seconds: int) -> None:
    """Run SITE in Chromium and compare its greedy continuation with OrtModel's."""
    for program in ("chromedriver", "chromium"):
        if shutil.which(program) is None:
            raise click.ClickException(f"no {program} on the PATH; on Debian: apt-get install chromium chromium-driver")
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    browser = Browser(server.server_port + 1 if server.server_port < 65535 else 9515)
    try:
        browser.open(address)
        wait(browser, "Ready", seconds)
        loaded = browser.script("return performance.now()")
        fill = "document.getElementById('prompt').value = arguments[0]; document.getElementById('count').value = arguments[1];"
        browser.script(fill + "document.getElementById('go').click();", prompt, count)
        time.sleep(0.2)
        wait(browser, "Ready", seconds)
        read = "return Object.fromEntries(['rate','prefill','position','size','state','text'].map(i => [i, document.getElementById(i).textContent]))"
        page = browser.script(read)
        tokens = json.loads(browser.script("return document.getElementById('output').dataset.tokens"))
        urls = browser.script("return performance.getEntriesByType('resource').map(e => e.name)")
        if screenshot:
            screenshot.write_bytes(browser.screenshot())
        errors = [entry for entry in browser.console() if entry["level"] == "SEVERE"]
    finally:
        browser.close()
        server.shutdown()
    tokenizer = Tokenizer.from_file(str(site / "model.tokenizer.json"))
    model = OrtModel.load(site / "model.onnx")
    stop = () if model.config.eos_token_id is None else (model.config.eos_token_id,)
    wanted = list(model.generate(tokenizer.encode(prompt, add_special_tokens=False).ids, count, stop=stop))
    same = next((i for i, pair in enumerate(zip(tokens, wanted, strict=False)) if pair[0] != pair[1]), len(wanted))
    elsewhere = [url for url in urls if not url.startswith(address)]
    result = {"tokens": len(tokens), "equal_tokens": same, "text_equal": page["text"] == tokenizer.decode(tokens),
              "loaded_ms": round(loaded), "elsewhere": elsewhere, "console_errors": errors, **page}  # fmt: skip
    click.echo(json.dumps(result))
    sys.exit(0 if tokens == wanted and result["text_equal"] and not elsewhere and not errors else 1)


def wait(browser: Browser, wanted: str, seconds: int) -> None:
    """Until the page's status is `wanted`; its own error ends the wait."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        text, error = browser.script(
            "const s = document.getElementById('status'); return [s.textContent, s.dataset.error]"
        )
        if error == "true":
            raise click.ClickException(f"the page says: {text}")
        if text == wanted:
            return
        time.sleep(0.1)
    raise click.ClickException(f"the page still says {text!r} after {seconds} s")


if __name__ == "__main__":
    run_command(check, "scripts/peers/check_web.py")
