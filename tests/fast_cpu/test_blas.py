"""OpenBLAS in place of mlx's BLAS: right products, and no change where a product is wrong."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from textpolicy import fast_cpu
from textpolicy.fast_cpu import blas, function_table

linux = pytest.mark.skipif(sys.platform != "linux", reason="mlx brings a fast BLAS elsewhere")

SHAPES = [(1, 1, 1), (1, 300, 7), (64, 64, 64), (5, 33, 129), (200, 3, 200)]
DTYPES = {np.float32: mx.float32, np.float64: mx.float64, np.complex64: mx.complex64}

IN_A_FRESH_PROCESS = """
import dataclasses, json, sys
import mlx.core as mx
import os
environment = dict(os.environ)
before = mx.random.state[0].tolist(), str(mx.default_device()), str(mx.default_stream(mx.cpu))
from textpolicy import fast_cpu
blas = fast_cpu.enable()
after = mx.random.state[0].tolist(), str(mx.default_device()), str(mx.default_stream(mx.cpu))
product = mx.matmul(mx.arange(64).reshape(8, 8) * 1.0, mx.eye(8), stream=mx.cpu)
record = dataclasses.asdict(blas) | {
    "undisturbed": before == after,
    "idempotent": fast_cpu.enable() == blas,
    "environment_kept": dict(os.environ) == environment,
    "right": product.tolist() == mx.arange(64.0).reshape(8, 8).tolist(),
}
print(json.dumps(record))
"""


# function_table.py is run as a script of its own, so that the table is read before the import.
AROUND_AN_IMPORT = """
import json, os, runpy, sys
import mlx.core
find_pointers = runpy.run_path(sys.argv[1])["_find_pointers"]
def addresses():
    pointers, _, _ = find_pointers(["cblas_sgemm", "cblas_dgemm", "cblas_cgemm"], "libmlx.so")
    return [pointer.value for pointer in pointers.values()]
def state():
    return addresses(), [repr(finder) for finder in sys.meta_path], dict(os.environ)
before = state()
import textpolicy, textpolicy.fast_cpu
imported = state() == before
import textpolicy.generation.mlx_generation, textpolicy.loop
imported = imported and addresses() == before[0]
textpolicy.load_model("tiny")
loaded = [old != new for old, new in zip(before[0], addresses())]
print(json.dumps({"unchanged_by_import": imported, "changed_by_load_model": loaded}))
"""


def printed_by(program: str, *argv: str, **environment: str) -> dict:
    """What the program prints in a fresh process; fails if it prints anything else."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *argv],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def blas_with(setting: str) -> dict:
    record = printed_by(IN_A_FRESH_PROCESS, TEXTPOLICY_BLAS=setting)
    assert record["undisturbed"] and record["idempotent"] and record["right"]
    assert record["environment_kept"]
    return record


def multiplies_right(dtype: type, shape: tuple[int, int, int]) -> bool:
    rows, inner, columns = shape
    rng = np.random.default_rng(0)
    a = rng.normal(size=(rows, inner)).astype(dtype)
    b = rng.normal(size=(inner, columns)).astype(dtype)
    if dtype is np.complex64:
        a, b = a + 1j * a[::-1], b - 2j * b[:, ::-1]
    with mx.stream(mx.cpu):
        straight = mx.array(a, dtype=DTYPES[dtype]), mx.array(b, dtype=DTYPES[dtype])
        turned = tuple(mx.contiguous(x.T).T for x in straight)
        return all(
            np.allclose(np.array(x @ y), a @ b, rtol=1e-4, atol=1e-4)
            for x in (straight[0], turned[0])
            for y in (straight[1], turned[1])
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_those_of_numpy(dtype, shape):
    fast_cpu.enable()
    assert multiplies_right(dtype, shape)


@linux
def test_enabling_uses_openblas_where_it_is_installed_and_disturbs_nothing():
    pytest.importorskip("scipy_openblas32")
    record = blas_with("")
    assert record["fast"] and record["name"].startswith("OpenBLAS")
    assert record["threads"] >= 1
    assert "scipy_openblas" in record["reason"]


@pytest.mark.slow
@linux
def test_importing_textpolicy_changes_nothing_and_loading_a_model_switches_the_blas():
    pytest.importorskip("scipy_openblas32")
    record = printed_by(AROUND_AN_IMPORT, function_table.__file__)
    assert record["unchanged_by_import"]
    assert record["changed_by_load_model"] == [True, True, True]


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    "start",
    [
        "tp.Trainer(model, None, None, None)",
        "tp.train_sft(model, [], [], None)",
        "tp.create_policy(model, None)",
    ],
)
def test_a_model_that_was_built_by_hand_multiplies_fast_once_it_is_trained_or_sampled(start):
    pytest.importorskip("scipy_openblas32")
    program = f"""
import json
from contextlib import suppress
import mlx.nn as nn
import textpolicy as tp
from textpolicy.fast_cpu import blas
model = nn.Linear(2, 2)
before = blas._choose_once.__wrapped__.cache_info().currsize
with suppress(Exception):
    {start}
print(json.dumps([before, blas._choose_once.__wrapped__.cache_info().currsize]))
"""
    assert printed_by(program) == [0, 1]


@linux
def test_off_keeps_the_blas_of_mlx():
    record = blas_with("off")
    assert not record["fast"]
    assert record["reason"] == "TEXTPOLICY_BLAS=off"


@linux
def test_a_library_without_the_products_is_declined_with_its_name_and_a_way_out():
    record = blas_with("libm.so.6")
    assert not record["fast"]
    assert record["reason"] == "libm.so.6 has no cblas_sgemm"
    assert record["hint"] == blas._hint_for(mx.default_device())


def test_a_gpu_needs_no_other_blas_and_a_cpu_gets_the_library_alone():
    assert blas._hint_for(mx.Device(mx.gpu)) == ""
    assert "pip install scipy-openblas32" in blas._hint_for(mx.Device(mx.cpu))
    assert "textpolicy[" not in blas._hint_for(mx.Device(mx.cpu))


@linux
def test_a_library_that_cannot_be_opened_is_declined_with_its_path():
    record = blas_with("/no/such/lib.so")
    assert not record["fast"]
    assert "/no/such/lib.so" in record["reason"]


@linux
def test_functions_that_do_not_multiply_are_noticed_and_undone():
    before = fast_cpu.enable()
    harmless = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value
    with pytest.raises(function_table.NotReplaced, match="undone: it gave a wrong float32 product"):
        blas._use(dict.fromkeys(blas._PRODUCTS, harmless))
    assert fast_cpu.enable() == before
    assert all(multiplies_right(dtype, (64, 64, 64)) for dtype in DTYPES)


@linux
@pytest.mark.parametrize("size", [0, 3, 64, 5000], ids="{} bytes".format)
def test_a_torn_library_file_is_declined(size, tmp_path):
    torn = tmp_path / "libmlx.so"
    torn.write_bytes((Path(mx.__file__).parent / "lib" / "libmlx.so").read_bytes()[:size])
    with pytest.raises(function_table.NotReplaced, match="not an ELF library of a known shape"):
        function_table._imported(torn)


@linux
def test_a_file_of_another_kind_is_declined(tmp_path):
    text = tmp_path / "libmlx.so"
    text.write_text("no library" * 100)
    with pytest.raises(function_table.NotReplaced, match="not a little-endian 64-bit ELF file"):
        function_table._imported(text)


@linux
def test_the_number_of_threads_can_be_chosen_and_is_reported():
    before = fast_cpu.enable().threads
    if before is None:
        pytest.skip("no OpenBLAS here")
    try:
        fast_cpu.set_threads(1)
        assert fast_cpu.enable().threads == 1
        assert multiplies_right(np.float32, (200, 300, 200))
    finally:
        fast_cpu.set_threads(before)
    assert fast_cpu.enable().threads == before


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (3, 2), (8, 7)])
def test_a_run_leaves_a_core_to_others_if_it_has_more_than_two(cores, threads):
    assert blas.threads_beside_others(cores) == threads


@linux
def test_a_number_of_threads_in_the_environment_is_kept(monkeypatch):
    if (now := fast_cpu.enable().threads) is None:
        pytest.skip("the threads of this BLAS cannot be set")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", str(now))
    assert fast_cpu.default_threads() == now
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 1 <= fast_cpu.default_threads() <= os.cpu_count()


def test_speed_is_a_measured_number():
    assert fast_cpu.measure_gflops(n=64) > 0


AFTER_A_PRODUCT = """
import time
import mlx.core as mx
from textpolicy import fast_cpu
fast_cpu.enable()
x = mx.ones((512, 512))
spent = []
for _ in range(5):
    mx.eval(x @ x)
    before = time.process_time()
    time.sleep(0.1)
    spent.append(time.process_time() - before)
print(fast_cpu.enable().threads, min(spent))
"""


@pytest.mark.slow
@linux
def test_threads_of_the_blas_sleep_between_products_unless_the_environment_says_otherwise():
    pytest.importorskip("scipy_openblas32")

    def spent(**settings: str) -> tuple[int, float]:
        command = [sys.executable, "-c", AFTER_A_PRODUCT]
        done = subprocess.run(
            command, env=os.environ | settings, capture_output=True, text=True, check=True
        )
        threads, seconds = done.stdout.split()
        return int(threads), float(seconds)

    threads, seconds = spent(OPENBLAS_NUM_THREADS="2")
    if threads < 2:
        pytest.skip("a single thread does not poll for products")
    assert seconds < 0.005
    # The threads of compiled loops, with which OpenBLAS computes too, have a time of their own.
    own = {
        "OPENBLAS_NUM_THREADS": "2",
        "OPENBLAS_THREAD_TIMEOUT": "28",
        "TEXTPOLICY_COMPILE": "off",
    }
    assert spent(**own)[1] > 0.01
