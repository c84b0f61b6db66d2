"""The product alone against ik_llama.cpp's IQ2_BN_R4, in turn, one thread, in cache.

    git clone https://github.com/ikawrakow/ik_llama.cpp && cmake -S ik_llama.cpp -B ik -DGGML_NATIVE=ON
    cmake --build ik --target ggml
    python scripts/bench/ik_product.py 1.3b.gguf ik/ggml/src/libggml.so

The model's first projection, whose codes are given to ik_llama.cpp with one scale a row, which is all that type has. Both
round the activations themselves. The last line on stdout is JSON: GMAC/s of every round, medians, errors against fp64, ratios.
"""

from __future__ import annotations

import ctypes as c
import json
import time
from pathlib import Path
from statistics import median

import click
import numpy as np

from runtime_ref.bench.peers.llama import FUNCTIONS as PRODUCT_FUNCTIONS
from runtime_ref.bench.peers.llama import GgmlProduct
from runtime_ref.bench.peers.products import Problem, Product, by_kernels, problem_of
from runtime_ref.kernels.isa import select
from tmexport.cli.app import run_command
from tmexport.errors import TmexportError

IQ2_BN_R4 = 335  # ggml.h of ik_llama.cpp
SHORTEST = 0.2  # seconds of a round
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "ggml_quantize_chunk": (c.c_size_t, [c.c_int, c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, c.c_void_p]),
    "ggml_row_size": (c.c_size_t, [c.c_int, c.c_int64]),
}


def open_ggml(path: Path) -> c.CDLL:
    """ik_llama.cpp's libggml with the functions declared that are used here.

    Raises:
        TmexportError: it cannot be loaded, or is no such library.
    """
    try:
        library = c.CDLL(str(path), mode=c.RTLD_GLOBAL)
        wanted = {name: kind for name, kind in PRODUCT_FUNCTIONS.items() if name.startswith("ggml_")} | _FUNCTIONS
        for name, (result, arguments) in wanted.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise TmexportError(f"{path}: cannot be used as ik_llama.cpp's libggml: {error}") from None
    return library


def by_ik(problem: Problem, library: c.CDLL, x: np.ndarray) -> Product:
    """IQ2_BN_R4 with one thread."""
    codes, scales, _ = problem.codes()
    n, k = codes.shape
    weights = np.ascontiguousarray(codes * scales.mean(axis=1, keepdims=True), np.float32)
    blocks = np.zeros(n * library.ggml_row_size(IQ2_BN_R4, k), np.uint8)
    library.ggml_quantize_chunk(IQ2_BN_R4, weights.ctypes.data, blocks.ctypes.data, 0, n, k, None)
    product = GgmlProduct(library, IQ2_BN_R4, blocks, (n, k), x)

    def run() -> np.ndarray:
        product.run()
        return product.result()

    return Product(run, weights.astype(np.float64), blocks.nbytes, 8)


def rate(product: Product, work: int) -> float:
    """Billions of multiply-adds a second of CPU time over at least SHORTEST seconds; the best of three parts."""
    best = 0.0
    for _ in range(3):
        start, times = time.process_time(), 0
        while time.process_time() - start < SHORTEST / 3:
            product.run()
            times += product.repeated
        best = max(best, work * times / (time.process_time() - start) / 1e9)
    return best


@click.command()
@click.argument("model_path", metavar="MODEL.gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("library_path", metavar="LIBGGML.so", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-m", "tokens", default="1,64", show_default=True, help="Tokens of the product.")
@click.option("-r", "rounds", default=5, show_default=True, help="Rounds, in which all take their turn.")
def ik_product(model_path: Path, library_path: Path, tokens: str, rounds: int) -> None:
    """Compare the product of MODEL.gguf's first projection with ik_llama.cpp's IQ2_BN_R4."""
    problem, library = problem_of(model_path), open_ggml(library_path)
    n, k = problem.shape
    rows = []
    for m in map(int, tokens.split(",")):
        x = problem.inputs(m)
        products = {"exact": by_kernels(problem, "exact", x), "fast": by_kernels(problem, "fast", x)}
        products["ik"] = by_ik(problem, library, x)
        rates: dict[str, list[float]] = {who: [] for who in products}
        for _ in range(rounds):
            for who, product in products.items():
                rates[who].append(round(rate(product, n * k * m), 1))
        middle = {who: median(values) for who, values in rates.items()}
        ratios = {who: round(middle[who] / middle["ik"], 2) for who in ("exact", "fast")}
        errors = {who: round(product.error(x), 5) for who, product in products.items()}
        rows.append({"tokens": m, "gmacs": middle, "ratio_to_ik": ratios, "rounds": rates, "error": errors})
        click.echo(f"{m:4} tokens: {middle}, {ratios} of ik_llama.cpp's, errors {errors}", err=True)
    isa = type(select()).__name__
    click.echo(json.dumps({"model": model_path.name, "shape": [n, k], "isa": isa, "rows": rows}))


if __name__ == "__main__":
    run_command(ik_product, "scripts/bench/ik_product.py")
