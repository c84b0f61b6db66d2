"""A server process with the demo model, as a user starts it."""

import pytest

from tests.serve.running import TEMPLATE, Server


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def server(template):
    with Server("--chat-template", template, "--max-tokens", 4096, "--threads", 1) as running:
        yield running
