"""Other people's JavaScript that a page carries along: from npm, or from a node_modules folder."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tmexport.errors import TmexportError, UsageError


@dataclass(frozen=True)
class Package:
    """name and version, which was tested; files: in the package, and what they are called in vendor/."""

    name: str
    version: str
    files: Mapping[str, str]


ONNXRUNTIME = Package(
    "onnxruntime-web",
    "1.30.0",
    {f"dist/{n}": n for n in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")},
)
TOKENIZERS = Package(
    "@huggingface/tokenizers",
    "0.2.0",
    {"dist/tokenizers.min.mjs": "tokenizers.min.mjs", "LICENSE": "tokenizers.LICENSE"},
)


def vendor_files(packages: Iterable[Package], node_modules: Path | None) -> dict[str, bytes]:
    """The packages' files by their names in vendor/.

    Args:
        packages: what is needed.
        node_modules: a folder that has them; None asks npm.

    Raises:
        UsageError: npm is needed and not installed.
        TmexportError: a file is missing, or npm cannot fetch a package.
    """
    found: dict[str, bytes] = {}
    for package in packages:
        members = _from_npm(package) if node_modules is None else _from_folder(package, node_modules)
        found |= {package.files[name]: data for name, data in members.items()}
    return found


def _from_folder(package: Package, node_modules: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name in package.files:
        path = node_modules / package.name / name
        try:
            found[name] = path.read_bytes()
        except OSError as error:
            raise TmexportError(f"{path}: cannot be read: {error.strerror}; expected a node_modules folder with {package.name}") from None  # fmt: skip
    return found


def _from_npm(package: Package) -> dict[str, bytes]:
    """The package as the registry has it, unpacked in memory; no script of it runs."""
    npm = shutil.which("npm")
    if npm is None:
        raise UsageError("npm is not installed; install it, or give a node_modules folder with --runtime")
    told = f"{package.name} {package.version}"
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", f"{package.name}@{package.version}", "--pack-destination", scratch, "--silent"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            reason = " ".join(result.stderr.split())[-200:]
            raise TmexportError(f"npm cannot fetch {told}: {reason}; give a node_modules folder with --runtime")
        members = _members((Path(scratch) / result.stdout.split()[-1]).read_bytes(), package.files)
    missing = min(set(package.files) - set(members), default=None)
    if missing is not None:
        raise TmexportError(f"{told}: holds no {missing}; give a node_modules folder with --runtime")
    return members


def _members(archive: bytes, names: Iterable[str]) -> dict[str, bytes]:
    """The wanted files of an npm package (all under package/)."""
    wanted, found = {f"package/{name}": name for name in names}, {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            if member.name in wanted and member.isfile():
                found[wanted[member.name]] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found
