"""Compile tmexport/web/kernels/*.ts (AssemblyScript) to tmexport/web/page/kernels.wasm; needs npm and the network.

    python scripts/web/build.py            # writes the file
    python scripts/web/build.py --check    # compiles, and compares with the file

A section of the file, "tmexport.built", says what it was made of: the versions of the compiler and the SHA-256 of the sources.
The last line on stdout is one JSON object; exit code 1 if the bytes differ.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from tmexport.cli.app import run_command
from tmexport.files import atomic_write

COMPILER = {
    "assemblyscript": "0.28.20",
    "binaryen": "131.0.0-nightly.20260721",
}  # the first asks for exactly the second
FLAGS = ("-O3", "--converge", "--runtime", "stub", "--enable", "simd", "--noAssert", "--importMemory", "--disableWarning", "112")  # fmt: skip
WEB = Path(__file__).parents[2] / "tmexport" / "web"
SOURCES, OUTPUT = WEB / "kernels", WEB / "page" / "kernels.wasm"
SECTION = "tmexport.built"


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; say whether the file is what the sources compile to.")
def build(check: bool) -> None:
    """Compile the page's kernels."""
    made = compiled()
    equal = OUTPUT.is_file() and OUTPUT.read_bytes() == made
    if not check:
        with atomic_write(OUTPUT) as file:
            file.write(made)
    click.echo(json.dumps({"bytes": len(made), "sha256": hashlib.sha256(made).hexdigest(), "equal": equal}))
    sys.exit(1 if check and not equal else 0)


def compiled() -> bytes:
    """The module that the sources compile to, with its section."""
    npm = shutil.which("npm")
    if npm is None:
        raise click.ClickException("npm is not installed; it brings the compiler, AssemblyScript")
    with tempfile.TemporaryDirectory() as scratch:
        packages = [f"{name}@{version}" for name, version in COMPILER.items()]
        _run([npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", scratch, *packages], Path(scratch))
        shutil.copytree(SOURCES, Path(scratch) / "kernels")
        compiler = Path(scratch) / "node_modules" / "assemblyscript" / "bin" / "asc.js"
        _run(["node", str(compiler), "kernels/index.ts", "-o", "kernels.wasm", *FLAGS], Path(scratch))
        module = (Path(scratch) / "kernels.wasm").read_bytes()
    return module + section(SECTION, json.dumps(COMPILER | {"sources": sources_digest()}).encode())


def sources_digest() -> str:
    """SHA-256 of the sources' names and bytes, by name."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.ts")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def section(name: str, content: bytes) -> bytes:
    """A custom section (WebAssembly core specification, 5.5.3): id 0, its size, the name with its size, the content."""
    body = _leb(len(name)) + name.encode() + content
    return b"\0" + _leb(len(body)) + body


def _leb(value: int) -> bytes:
    """An unsigned LEB128 number."""
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _run(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = " ".join((result.stderr or result.stdout).split())[-400:]
        raise click.ClickException(f"{Path(command[0]).name}: {reason}")


if __name__ == "__main__":
    run_command(build, "scripts/web/build.py")
