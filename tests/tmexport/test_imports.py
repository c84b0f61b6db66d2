"""A board without torch: importing costs little and pulls in nothing heavy."""

import subprocess
import sys

import pytest


def test_tmexport_is_numpy_alone():
    code = "import sys, tmexport, tmexport.cli, tmexport.types, tmexport.model; print(*{'numba', 'llvmlite', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "package", ["tmexport", "tmexport.cli", "runtime_ref", "zero_shot.cli", "zero_shot.runtime_scorer"]
)
def test_import_is_light(package):
    code = (
        f"import sys, {package}; print(*sorted({{'torch', 'onnx', 'transformers', 'onnxruntime'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
