"""Starting `tmexport serve` and talking to it, below any client library."""

import http.client
import json
import re
import select
import signal
import socket
import subprocess
import sys
import time

from tests.demo.running import ROOT

TEMPLATE = """\
{%- for message in messages -%}
{{ message.role | capitalize }}: {{ message.content }}

{% endfor -%}
{%- if add_generation_prompt -%}
Assistant:
{%- endif -%}
"""


class Server:
    """A process that listens at a free port; `stderr` collects once it has ended."""

    def __init__(self, *args, environment=None):
        self._args, self._environment, self.stderr = [str(a) for a in args], environment, ""

    def __enter__(self):
        code = "from tmexport.cli import main; main()"
        command = [sys.executable, "-c", code, "serve", "--port", "0", *self._args]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=self._environment, text=True
        )
        end = time.monotonic() + 200
        while time.monotonic() < end:
            if select.select([self.process.stderr], [], [], 0.5)[0]:
                line = self.process.stderr.readline()
                self.stderr += line
                if found := re.search(r" at http://(\S+):(\d+)$", line):
                    self.host, self.port = found[1], int(found[2])
                    return self
                if not line:
                    break
        self.stop(signal.SIGKILL)
        raise AssertionError(f"the server did not start: {self.stderr}")

    def __exit__(self, *_):
        self.stop(signal.SIGTERM)

    def stop(self, number):
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.stderr += self.process.communicate(timeout=30)[1]
        return self.process.returncode

    @property
    def url(self):
        return f"http://{self.host}:{self.port}"

    def ask(self, method, path, body=None, headers=None):
        """Status and text of an answer; `body` is sent as JSON unless it is bytes."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"} | (headers or {}))
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def post(self, path, **body):
        """The answer of a good request."""
        status, text = self.ask("POST", path, body)
        assert status == 200, text
        return json.loads(text)

    def complete(self, **body):
        return self.post("/v1/completions", **body)

    def metric(self, name):
        text = self.ask("GET", "/metrics")[1]
        return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))

    def connect(self):
        """A bare connection."""
        return socket.create_connection((self.host, self.port), timeout=30)


def request_bytes(path, body, **headers):
    """A POST as it goes over the wire."""
    data = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    lines += [f"{k}: {v}" for k, v in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + data
