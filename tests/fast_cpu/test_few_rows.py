"""Compiled products of few rows: right, the same beside other rows, and no need for a compiler."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from textpolicy import activity, fast_cpu
from textpolicy.fast_cpu import few_rows
from textpolicy.fast_cpu.compiler import CompiledLibrary

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mlx brings a fast BLAS elsewhere")


@pytest.fixture
def compiled() -> None:
    blas = fast_cpu.enable()
    if not blas.few_rows:
        pytest.skip(blas.few_rows_reason or blas.reason)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 15, 16, 17, 48, 49])
@pytest.mark.parametrize("columns", [1, 6, 63, 256])
@pytest.mark.parametrize("inner", [63, 64, 133, 576])
def test_products_equal_those_of_numpy(rows, columns, inner):
    rng = np.random.default_rng(rows * columns + inner)
    x = rng.normal(size=(rows, inner)).astype(np.float32)
    weight = rng.normal(size=(columns, inner)).astype(np.float32)
    start = rng.normal(size=(rows, columns)).astype(np.float32)
    with mx.stream(mx.cpu):
        product = mx.array(x) @ mx.array(weight).T
        # An offset of one number: no vector of the weights begins where a line of the cache does.
        shifted = mx.array(np.append(np.float32(0), weight))[1:].reshape(weight.shape)
        added = mx.addmm(mx.array(start), mx.array(x), shifted.T, alpha=0.5, beta=2.0)
        expected = x.astype(np.float64) @ weight.T.astype(np.float64)
        np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(added, 2 * start + expected / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("compiled")
def test_what_a_row_gives_does_not_depend_on_the_rows_beside_it():
    with mx.stream(mx.cpu):
        x, weight = mx.random.normal((16, 576)), mx.random.normal((770, 576))
        together = np.array(x @ weight.T)
        for rows in (1, 2, 5, 7):
            np.testing.assert_array_equal(np.array(x[3 : 3 + rows] @ weight.T), together[3:][:rows])


@pytest.mark.usefixtures("compiled", "threads_restored")
def test_all_threads_together_give_what_one_thread_gives():
    with mx.stream(mx.cpu):
        x, weight = mx.random.normal((3, 700)), mx.random.normal((1001, 700))
        products = []
        for threads in (1, 2, 3):
            fast_cpu.set_threads(threads)
            products.append(np.array(x @ weight.T))
    np.testing.assert_array_equal(products[0], products[1])
    np.testing.assert_array_equal(products[0], products[2])


@pytest.mark.usefixtures("compiled")
def test_few_rows_reach_the_compiled_loops_and_many_rows_the_blas(tmp_path):
    """The other products are counted by a function of the test, which multiplies nothing."""
    calls: list[int] = []
    signature = [ctypes.c_int] * 6 + [ctypes.c_float] + [ctypes.c_void_p, ctypes.c_int] * 2
    others = ctypes.CFUNCTYPE(None, *signature, ctypes.c_float, ctypes.c_void_p, ctypes.c_int)(
        lambda *arguments: calls.append(arguments[3])
    )
    one_thread = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)
    # A copy of the library has its own other products: those of this process stay as they are.
    library = ctypes.CDLL(str(few_rows.LOOPS.compiled(tmp_path)))
    library.few_rows_begin(others, one_thread)
    product = library.few_rows_product
    product.argtypes = [*signature, ctypes.c_float, ctypes.c_void_p, ctypes.c_int]
    x, weight = np.ones((64, 256), np.float32), np.ones((32, 256), np.float32)
    out = np.zeros((64, 32), np.float32)

    def multiply(rows: int, *, inner: int = 256, transposed: int = 112) -> None:
        pointers = x.ctypes.data, 256, weight.ctypes.data, 256, 0.0, out.ctypes.data, 32
        product(101, 111, transposed, rows, 32, inner, 1.0, *pointers)

    multiply(1)
    multiply(16)
    assert calls == [] and (out[:16] == 256).all() and (out[16:] == 0).all()
    multiply(64)
    multiply(1, inner=63)
    multiply(1, transposed=111)
    assert calls == [64, 1, 1]


@pytest.mark.usefixtures("compiled")
def test_progress_can_say_that_a_library_is_compiled(monkeypatch, tmp_path):
    library = CompiledLibrary(
        name="nothing",
        language="C",
        compilers=("cc", "gcc", "clang"),
        sources=("few_rows.c",),
        headers=(),
        options=(("-O0",),),
    )
    seen: list[str] = []
    monkeypatch.setattr(
        CompiledLibrary, "try_out", lambda self, path: seen.append(activity.described())
    )
    path = library.compiled(tmp_path)
    assert seen == ["compiling functions for this processor, only this once"]
    assert library.compiled(tmp_path) == path and len(seen) == 1


def few_rows_in_a_fresh_process(cache: Path, **environment: str) -> list[str]:
    program = (
        "import mlx.core as mx\n"
        "from textpolicy import fast_cpu\n"
        "blas = fast_cpu.enable()\n"
        "with mx.stream(mx.cpu):\n"
        "    right = (mx.ones((2, 300)) @ mx.ones((5, 300)).T).tolist() == [[300.0] * 5] * 2\n"
        "print(blas.fast, blas.few_rows, right, blas.few_rows_reason, sep='|')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip().split("|")


@pytest.mark.usefixtures("compiled")
@pytest.mark.slow
def test_the_loops_are_compiled_once_and_kept_for_this_processor(tmp_path):
    assert few_rows_in_a_fresh_process(tmp_path)[:3] == ["True", "True", "True"]
    (kept,) = (tmp_path / "textpolicy").iterdir()
    assert kept.suffix == ".so"
    # No compiler is asked a second time.
    again = few_rows_in_a_fresh_process(tmp_path, PATH="/nowhere")
    assert again[:3] == ["True", "True", "True"]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "/nowhere"}, "no C compiler"),
        ({"TEXTPOLICY_COMPILE": "off"}, "TEXTPOLICY_COMPILE=off"),
        ({"XDG_CACHE_HOME": "/proc/none"}, "cannot be kept or opened"),
    ],
)
def test_without_a_compiler_or_a_folder_the_blas_computes_all_products(
    environment, reason, tmp_path
):
    fast, few, right, said = few_rows_in_a_fresh_process(tmp_path, **environment)
    assert (fast, few, right) == ("True", "False", "True")
    assert reason in said


@pytest.mark.usefixtures("compiled")
def test_a_compiler_that_fails_is_named_with_its_last_line(tmp_path):
    compiler = tmp_path / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'cc: cannot do this' >&2\nexit 1\n")
    compiler.chmod(0o755)
    *_, said = few_rows_in_a_fresh_process(tmp_path, PATH=str(compiler.parent))
    assert said == f"{compiler} failed: cc: cannot do this"
    assert list((tmp_path / "textpolicy").iterdir()) == []


@pytest.mark.usefixtures("compiled")
def test_a_folder_that_others_may_write_to_is_not_used(tmp_path):
    folder = tmp_path / "textpolicy"
    folder.mkdir()
    folder.chmod(0o777)
    fast, few, right, said = few_rows_in_a_fresh_process(tmp_path)
    assert (fast, few, right) == ("True", "False", "True")
    reason = f"others than you could change the files in {folder}"
    assert said == f"compiled loops cannot be kept or opened: {reason}"
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("compiled")
def test_a_kept_file_that_is_torn_is_compiled_again(tmp_path):
    folder = tmp_path / "textpolicy"
    folder.mkdir(mode=0o700)
    torn = folder / f"loops-{few_rows.LOOPS.key}.so"
    torn.write_bytes(b"\x7fELF torn")
    assert few_rows_in_a_fresh_process(tmp_path)[:3] == ["True", "True", "True"]
    assert torn.stat().st_size > 1000
