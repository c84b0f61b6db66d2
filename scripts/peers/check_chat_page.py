"""Open the page of `tmexport serve` in a headless Chromium, send a message, and compare with the API's own answer.

    python scripts/peers/check_chat_page.py --screenshot docs/serve.png

Needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver). The last line on stdout is one JSON
object; the exit code is 0 if the page shows the API's text and the browser's console has no error.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import click

from scripts.peers.browsers import Browser, Chromium
from tests.serve.running import TEMPLATE, Server
from tmexport.cli.app import run_command

_FILL = "for (const [id, value] of Object.entries(arguments[0])) document.getElementById(id).value = value;"


@click.command()
@click.option("--prompt", default="How is the Union?", show_default=True)
@click.option("--screenshot", type=click.Path(path_type=Path))
def check(prompt: str, screenshot: Path | None) -> None:
    """Chat with the demo model through the page."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "chat.jinja").write_text(TEMPLATE)
        with Server("--chat-template", Path(folder) / "chat.jinja", "--threads", 1) as server:
            browser = Chromium()
            try:
                browser.open(server.url + "/")
                _wait(browser, "Ready")
                browser.script(_FILL + "document.getElementById('form').requestSubmit();", {"prompt": prompt, "temperature": "0", "count": "60"})  # fmt: skip
                time.sleep(0.2)
                status = _wait(browser, "Ready (")
                shown = browser.script("return [...document.querySelectorAll('#log > div')].map(d => [d.className, d.textContent])")  # fmt: skip
                if screenshot:
                    screenshot.write_bytes(browser.screenshot())
                errors = [message for message in browser.errors() if "favicon" not in message]
            finally:
                browser.close()
            message = [{"role": "user", "content": prompt}]
            answer = server.post("/v1/chat/completions", messages=message, temperature=0, max_tokens=60)
    wanted = [["user", prompt], ["assistant", answer["choices"][0]["message"]["content"]]]
    click.echo(json.dumps({"equal": shown == wanted, "status": status, "shown": shown, "console_errors": errors}))
    sys.exit(0 if shown == wanted and not errors else 1)


def _wait(browser: Browser, beginning: str, seconds: float = 60.0) -> str:
    """The page's status, once it begins so."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        text = browser.script("return document.getElementById('status').textContent")
        if text.startswith(beginning):
            return text
        time.sleep(0.1)
    raise click.ClickException(f"the page still says {text!r} after {seconds:.0f} s")


if __name__ == "__main__":
    run_command(check, "scripts/peers/check_chat_page.py")
