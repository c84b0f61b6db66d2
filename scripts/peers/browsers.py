"""Headless browsers that scripts open pages in: Chromium through chromedriver (W3C WebDriver), Firefox through its Marionette port.

Debian: apt-get install chromium chromium-driver firefox-esr.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, Protocol

import click

SECONDS = 300  # the longest that one command may take


class Browser(Protocol):
    """One session with an empty profile; `script` returns what the code returns."""

    def open(self, url: str) -> None: ...
    def script(self, code: str, *args: object) -> Any: ...
    def screenshot(self) -> bytes: ...
    def errors(self) -> list[str]: ...
    def close(self) -> None: ...


class Chromium:
    """A chromedriver that this object starts and ends, and the browser that it starts."""

    def __init__(self) -> None:
        _need("chromedriver", "chromium")
        port = _free_port()
        self._driver = subprocess.Popen(["chromedriver", f"--port={port}", "--silent"], stdout=subprocess.DEVNULL)
        self._base = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=900,1040", "--disable-dev-shm-usage"]  # fmt: skip
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"}}  # fmt: skip
        answer = _until_it_answers(lambda: self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}}))
        self._base += f"/session/{answer['sessionId']}"

    def _call(self, method: str, path: str, body: dict | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def script(self, code: str, *args: object) -> Any:
        return self._call("POST", "/execute/sync", {"script": code, "args": list(args)})

    def screenshot(self) -> bytes:
        return base64.b64decode(self._call("GET", "/screenshot"))

    def errors(self) -> list[str]:
        """Severe lines of the console since the last call."""
        log = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]

    def close(self) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(10)


class Firefox:
    """A Firefox that this object starts and ends, spoken to as geckodriver does (Marionette: JSON with its length before it)."""

    def __init__(self) -> None:
        _need("firefox-esr")
        self._profile = tempfile.TemporaryDirectory()
        port, self._id = _free_port(), 0
        settings = {"marionette.port": port, "dom.serviceWorkers.testing.enabled": True, "app.update.enabled": False}
        lines = [f'user_pref("{name}", {json.dumps(value)});\n' for name, value in settings.items()]
        (Path(self._profile.name) / "user.js").write_text("".join(lines))
        command = ["firefox-esr", "--headless", "--no-remote", "--marionette", "--width", "900", "--height", "1040", "--profile", self._profile.name]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._socket = _until_it_answers(lambda: socket.create_connection(("127.0.0.1", port), SECONDS))
        self._receive()
        self._call("WebDriver:NewSession")

    def _receive(self) -> Any:
        length = b""
        while not length.endswith(b":"):
            length += self._read(1)
        return json.loads(self._read(int(length[:-1])))

    def _read(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            part = self._socket.recv(count - len(found))
            if not part:
                raise click.ClickException("Firefox has ended")
            found += part
        return found

    def _call(self, command: str, **arguments: object) -> Any:
        self._id += 1
        body = json.dumps([0, self._id, command, arguments]).encode()
        self._socket.sendall(str(len(body)).encode() + b":" + body)
        _, _, error, result = self._receive()
        if error:
            raise click.ClickException(f"{command}: {error['error']}: {error['message']}")
        return result

    def open(self, url: str) -> None:
        self._call("WebDriver:Navigate", url=url)

    def script(self, code: str, *args: object) -> Any:
        return self._call("WebDriver:ExecuteScript", script=code, args=list(args))["value"]

    def screenshot(self) -> bytes:
        return base64.b64decode(self._call("WebDriver:TakeScreenshot", full=False)["value"])

    def errors(self) -> list[str]:
        """Nothing: Marionette has no log of the console."""
        return []

    def close(self) -> None:
        try:
            self._call("Marionette:Quit", flags=["eForceQuit"])
        finally:
            self._process.terminate()
            self._process.wait(20)
            self._profile.cleanup()


BROWSERS: dict[str, type[Chromium] | type[Firefox]] = {"chromium": Chromium, "firefox": Firefox}


def _need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            raise click.ClickException(f"no {program} on the PATH; on Debian: apt-get install chromium chromium-driver firefox-esr")  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _until_it_answers(ask: Any) -> Any:
    for attempt in range(300):
        try:
            return ask()
        except OSError:
            if attempt == 299:
                raise
            time.sleep(0.1)
