"""The threads of the loops: several callers at once, child processes, and no deadlock."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from tests.fast_cpu.arrays import normal
from textpolicy import fast_cpu
from textpolicy.fast_cpu import exponential
from textpolicy.fast_cpu.attention import scaled_dot_product_attention
from textpolicy.fast_cpu.compiler import FOLDER

pytestmark = pytest.mark.usefixtures("compiled_operations", "threads_restored")


# Each is large enough for several threads.
WORK: dict[str, tuple[Callable[..., mx.array], list[mx.array]]] = {
    "few rows": (lambda x, w: x @ w.T, [normal(4, 600), normal(900, 600, seed=1)]),
    "many rows": (lambda x, w: x @ w, [normal(300, 400), normal(400, 500, seed=1)]),
    "one row": (lambda x, w: x @ w, [normal(1, 1200), normal(1200, 900, seed=1)]),
    "exponentials": (exponential.exp, [normal(300, 400)]),
    "softmax": (exponential.softmax, [normal(300, 400)]),
    "attention": (
        lambda q, k, v: scaled_dot_product_attention(q, k, v, None, 0.3, "causal"),
        [normal(2, 4, 150, 32), normal(2, 2, 150, 32, seed=1), normal(2, 2, 150, 32, seed=2)],
    ),
}


def result_of(name: str) -> np.ndarray:
    function, arrays = WORK[name]
    # A stream of its own, or else threads would wait for each other in mlx.
    with mx.stream(mx.new_stream(mx.cpu)):
        return np.array(function(*arrays))


def in_threads(*functions: Callable[[], None]) -> None:
    """Run the functions at once; raise what the first of them raises."""
    errors: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,), daemon=True) for one in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def same_bits(name: str, expected: np.ndarray, times: int = 5) -> Callable[[], None]:
    def repeat() -> None:
        for _ in range(times):
            np.testing.assert_array_equal(result_of(name), expected, err_msg=name)

    return repeat


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 9])
def test_several_callers_at_once_get_the_bits_of_one_alone(threads):
    fast_cpu.set_threads(threads)
    expected = {name: result_of(name) for name in WORK}
    in_threads(*(same_bits(name, expected[name]) for name in WORK))


@pytest.mark.parametrize("name", WORK)
def test_a_function_called_by_several_at_once_gives_the_bits_of_one_alone(name):
    fast_cpu.set_threads(2)
    expected = result_of(name)
    in_threads(*[same_bits(name, expected, times=4)] * 4)


def test_large_products_of_another_thread_change_no_bit():
    fast_cpu.set_threads(2)
    expected = {name: result_of(name) for name in WORK}
    x = normal(500, 500)
    right = np.array(x, np.float64) @ np.array(x, np.float64)
    ended = threading.Event()

    def multiply() -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            while not ended.is_set():
                np.testing.assert_allclose(x @ x, right, atol=1e-3)

    def others() -> None:
        try:
            for name, one in expected.items():
                same_bits(name, one)()
        finally:
            ended.set()

    in_threads(multiply, multiply, others)


@pytest.mark.parametrize("name", WORK)
def test_the_number_of_threads_can_change_between_products(name):
    fast_cpu.set_threads(1)
    alone = result_of(name)
    for threads in (2, 4, 1, 3, 16, 2, 1):
        fast_cpu.set_threads(threads)
        assert fast_cpu.enable().threads == threads
        found = result_of(name)
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-4)
        if name not in ("many rows", "one row"):  # These are OpenBLAS' own.
            np.testing.assert_array_equal(found, alone)


PROGRAM = """
import ctypes, faulthandler, os, sys, threading, time
import mlx.core as mx
import numpy as np
from textpolicy import fast_cpu
from textpolicy.fast_cpu.few_rows import compiled_loops
from textpolicy.fast_cpu.mlx_operations import reason_of_none

assert fast_cpu.enable().few_rows and not reason_of_none()
faulthandler.dump_traceback_later(50)
loops = compiled_loops()
product = loops.few_rows_product
pointer, number = ctypes.c_void_p, ctypes.c_int
product.argtypes = [*[number] * 6, ctypes.c_float, pointer, number, pointer, number]
product.argtypes += [ctypes.c_float, pointer, number]

def multiply(x, w, transposed):
    y = np.full((len(x), len(w) if transposed else w.shape[1]), np.nan, np.float32)
    sizes = len(x), y.shape[1], x.shape[1]
    product(101, 111, 112 if transposed else 111, *sizes, 1, x.ctypes.data, x.shape[1],
            w.ctypes.data, w.shape[1], 0, y.ctypes.data, y.shape[1])
    return y

def powers(x):
    y = np.full_like(x, np.nan)
    ins, outs = (pointer * 1)(x.ctypes.data), (pointer * 1)(y.ctypes.data)
    loops.compiled_exp(ins, outs, (ctypes.c_int64 * 16)(x.size, x.size))
    return y

rng = np.random.default_rng(0)
few, many = (rng.normal(size=(n, 600)).astype(np.float32) for n in (3, 300))
square = rng.normal(size=(600, 600)).astype(np.float32)

def check():
    for x in (few, many):
        for transposed in (True, False):
            right = x @ (square.T if transposed else square)
            assert np.allclose(multiply(x, square, transposed), right, atol=1e-3)
    assert np.allclose(powers(many.ravel()), np.exp(many.ravel()), rtol=1e-5)
"""

CHILD = """
fast_cpu.set_threads(int(sys.argv[1]))
check()
if sys.argv[2] == "busy":
    # Without products of OpenBLAS, in which no process may be forked.
    right = multiply(few, square, True)
    def work():
        while True:
            assert (multiply(few, square, True) == right).all()
            powers(many.ravel())
    for _ in range(2):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.05)
for _ in range(int(sys.argv[3])):
    child = os.fork()
    if not child:
        try:
            check()
            fast_cpu.set_threads(3)
            check()
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    if sys.argv[2] == "idle":
        check()
print("done")
sys.stdout.flush()
os._exit(0)
"""

STRESS = """
end = time.monotonic() + float(sys.argv[1])
errors = []

def repeat(function):
    try:
        while time.monotonic() < end and not errors:
            function()
    except BaseException as error:
        errors.append(error)

def by_mlx():
    with mx.stream(mx.new_stream(mx.cpu)):
        x = mx.array(many)
        for _ in range(20):
            y = mx.array(few) @ mx.array(square).T
            z = x @ mx.array(square)
            mx.eval(y, z)
            assert np.allclose(y, few @ square.T, atol=1e-3)

def now_and_then():
    # A helper sleeps after a tenth of a millisecond, and has to be woken.
    check()
    time.sleep(0.0003)

def small():
    for size in (40_000, 33_000):
        x = many.ravel()[:size]
        assert np.allclose(powers(x), np.exp(x), rtol=1e-5)

fast_cpu.set_threads(int(sys.argv[2]))
work = [check, check, now_and_then, small, small, by_mlx]
threads = [threading.Thread(target=repeat, args=(one,), daemon=True) for one in work]
for thread in threads: thread.start()
for thread in threads: thread.join()
if errors: raise errors[0]
print("done")
"""


def run(program: str, *arguments: str) -> None:
    """Run a program in a process that is ended after a minute."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={name: text for name, text in os.environ.items() if not name.endswith("NUM_THREADS")},
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["2", "4"])
def test_a_forked_process_computes_with_threads_of_its_own(threads):
    run(CHILD, threads, "idle", "2")


@pytest.mark.slow
def test_a_process_may_be_forked_while_threads_compute():
    run(CHILD, "2", "busy", "4")


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["2", "7"])
def test_many_callers_for_some_seconds_neither_hang_nor_give_a_wrong_number(threads):
    run(STRESS, "2", threads)


@pytest.mark.slow
def test_a_job_begun_by_many_at_once_does_each_part_once(tmp_path):
    """Each part adds 1 to numbers of its own, so a part done twice or never is seen."""
    source = tmp_path / "count.c"
    source.write_text(
        '#include "loops.h"\n'
        "int threads_for(int is_large) { return is_large ? 4 : 1; }\n"
        "int count(int *numbers, int size, int parts, int times) {\n"
        "    for (int time = 0; time < times; time++) {\n"
        '        _Pragma("omp parallel for num_threads(parts)")\n'
        "        for (int i = 0; i < size; i++) numbers[i]++;\n"
        "        for (int i = 0; i < size; i++) if (numbers[i] != time + 1) return i + 1;\n"
        "    }\n"
        "    return 0;\n"
        "}\n"
    )
    program = (
        "import ctypes, sys, threading\n"
        "count = ctypes.CDLL(sys.argv[1]).count\n"
        "wrong = []\n"
        "def run(parts):\n"
        "    for size in (1, 3, 100):\n"
        "        numbers = (ctypes.c_int * size)()\n"
        "        wrong.append(count(numbers, size, parts, 5_000))\n"
        "threads = [threading.Thread(target=run, args=(n,)) for n in (1, 2, 4, 16, 250)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "assert wrong == [0] * 15, wrong\n"
    )
    library = tmp_path / "count.so"
    sources = [str(source), str(FOLDER / "threads.c")]
    options = ["-O2", "-fopenmp", "-pthread", "-shared", "-fPIC", f"-I{FOLDER}"]
    subprocess.run(["cc", *options, *sources, "-o", str(library)], check=True, timeout=60)
    subprocess.run([sys.executable, "-c", program, str(library)], check=True, timeout=60)
