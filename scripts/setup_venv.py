"""Create a virtual environment for the Makefile, and install the project into it with one of its extras.

Usage: python3 scripts/setup_venv.py .venv [demo | dev | lowest]

demo: what `make demo` needs. dev (if none is named): what tests and tools need, the demo's too. lowest: the [test] extra,
every dependency that pyproject.toml names in the lowest version that it allows.

Standard library only, because nothing else is there yet. Done once: a stamp file in the environment remembers what it was
made for (this checkout, this Python, this pyproject.toml), and as long as that holds, nothing is done. An environment
that was made for another folder is replaced, because its scripts would run the other folder's Python.
pip's output goes to setup.log in the environment and is shown only if it fails.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
SERVED_BY = {"demo": ("demo", "dev"), "dev": ("dev",), "lowest": ("lowest",)}  # what is wanted: what will do


def wanted_stamp(venv: Path, what: str = "dev") -> str:
    project = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    return f"checkout {ROOT}\nvenv {venv}\npython {sys.version.split()[0]}\npyproject {project}\ninstalled {what}\n"


def lowest_constraints() -> list[str]:
    """`name==version` for every `name>=version` of pyproject.toml."""
    import tomllib  # not at the top: an older Python must get as far as our own message

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return sorted(line.replace(">=", "==") for line in named if ">=" in line)


def is_ours(venv: Path) -> bool:
    """Whether `venv` was made under this very path, and its Python still runs as the version we are."""
    try:
        if str(venv) not in (venv / "bin" / "activate").read_text(encoding="utf-8"):
            return False
        command = [str(venv / "bin" / "python"), "-c", "import sys; print(sys.version.split()[0])"]
        return (
            subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            == sys.version.split()[0]
        )
    except OSError:
        return False


def cpu_index() -> list[str]:
    """pip's option for PyTorch's CPU builds, where they can be reached: PyPI's build brings gigabytes of CUDA along."""
    try:
        with urllib.request.urlopen(f"{CPU_WHEELS}/torch/", timeout=10):
            return ["--extra-index-url", CPU_WHEELS]
    except OSError:
        return []


def run_logged(command: list[str], log: Path, what: str, must_succeed: bool = True) -> None:
    """Run `command` with its output in `log`; on a terminal, show its latest line and the time it has taken.

    Raises:
        SystemExit: it must succeed and failed; the log's end was shown.
    """
    began = time.monotonic()
    live = sys.stderr.isatty()
    if not live:
        print(what, file=sys.stderr, flush=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        while process.poll() is None:
            if live:
                width = shutil.get_terminal_size().columns - 1
                lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
                latest = next((line.strip() for line in reversed(lines) if line.strip()), "")
                text = f"{what} {time.monotonic() - began:.0f} s  {latest}"
                print(f"\r\033[K{text[:width]}", end="", file=sys.stderr, flush=True)
            time.sleep(0.2)
    if live:
        print(f"\r\033[K{what} {time.monotonic() - began:.0f} s", file=sys.stderr)
    if process.returncode and must_succeed:
        print("\n".join(log.read_text(encoding="utf-8", errors="replace").split("\n")[-40:]), file=sys.stderr)
        sys.exit(
            f"setup failed: the lines above are the end of {log}; correct the cause and run the same command again"
        )


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - this line is for whoever runs an older one
        sys.exit(
            f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; name one: make PYTHON=python3.12 ..."
        )
    venv, what = Path(os.path.abspath(sys.argv[1])), next(iter(sys.argv[2:]), "dev")
    if what not in SERVED_BY:
        sys.exit(f"{what}: is no set of dependencies; expected {', '.join(SERVED_BY)}")
    stamp = venv / "tmexport.stamp"
    stamps = [wanted_stamp(venv, other) for other in SERVED_BY[what]]
    if stamp.is_file() and stamp.read_text(encoding="utf-8") in stamps and is_ours(venv):
        return
    if not is_ours(venv):
        if venv.is_symlink() or venv.is_file():
            venv.unlink()
        elif venv.exists():
            if not (venv / "pyvenv.cfg").is_file() and any(venv.iterdir()):
                sys.exit(
                    f"{venv}: exists and is not a virtual environment; move it away, or choose another: make VENV=..."
                )
            shutil.rmtree(venv)
    venv.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    log = venv / "setup.log"
    log.write_text("", encoding="utf-8")
    run_logged([sys.executable, "-m", "venv", str(venv)], log, f"Preparing {os.path.relpath(venv)}/ ...")
    packages = ["-e", f".[{what}]"]
    if what == "lowest":
        constraints = venv / "lowest.txt"
        constraints.write_text("\n".join(lowest_constraints()) + "\n", encoding="utf-8")
        packages = ["-c", str(constraints), "-e", ".[test]"]
    python = str(venv / "bin" / "python")
    # pip compiles every module on one core, which is half of its time; compileall does it on all of them.
    pip = [python, "-m", "pip", "install", "--progress-bar", "off", "--no-compile", *cpu_index(), *packages]
    run_logged(pip, log, "Installing tmexport and what it needs (PyTorch among it; a minute or two, once) ...")
    run_logged(
        [python, "-m", "compileall", "-qq", "-j", "0", *map(str, venv.glob("lib/*/site-packages"))],
        log,
        "Compiling it ...",
        False,
    )
    stamp.write_text(wanted_stamp(venv, what), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
