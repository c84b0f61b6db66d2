"""What only Linux or only POSIX has, taken away: the commands work without. macOS and Windows themselves were not tried."""

import os
import subprocess
import sys

from runtime_ref.command import DEMO_MODEL
from tests.demo.running import ROOT
from tests.models import SMALL, write_small

# As on Windows: no affinity, no users, no SIGHUP, no module resource, a folder that cannot be opened, no /proc and /sys.
PRELUDE = """
import builtins, io, os, signal, sys, mmap
for module, names in ((os, "sched_getaffinity sched_setaffinity getuid O_DIRECTORY fork getloadavg"),
                      (signal, "SIGHUP SIGPIPE SIGQUIT SIGUSR1 SIGALRM"), (mmap, "MADV_DONTNEED MADV_WILLNEED")):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
for name in ("resource", "fcntl", "termios", "pwd", "grp"):
    sys.modules[name] = None
real, seen = os.open, builtins.open
def open_file(path, *args, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return real(path, *args, **more)
def open_text(path, *args, **more):
    if str(path).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", path)
    return seen(path, *args, **more)
os.open, builtins.open, io.open = open_file, open_text, open_text
from tmexport.cli import cli
from tmexport.cli.app import outcome
for words in WORDS:
    code = outcome(cli, "tmexport", words)
    if code:
        sys.exit(code)
print("all done")
"""


def test_commands_without_what_linux_has(tmp_path):
    folder = write_small(tmp_path / "m", SMALL, 256)
    gguf, demo = str(tmp_path / "m.gguf"), str(DEMO_MODEL)
    words = [
        ["gguf", str(folder), gguf],
        ["verify", str(folder), gguf],
        ["inspect", gguf],
        ["card", str(folder)],
        ["generate", demo, "--prompt", "Fellow citizens", "-n", "4", "--threads", "2"],
        ["bench", demo, "-p", "1", "-n", "1", "-t", "1", "-r", "1", "--depth", "0", "--chunks", "1"],
    ]
    code = PRELUDE.replace("WORDS", repr(words))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all done\n")
    assert "Fellow citizens" in done.stdout
