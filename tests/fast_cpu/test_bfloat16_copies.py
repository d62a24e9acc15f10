"""Products with bfloat16 copies of weights: right, exact for each row, and gone with the model."""

import gc
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from tests.devices import only_on_a_cpu
from textpolicy import fast_cpu, machine
from textpolicy.adapters.container import shared_copy
from textpolicy.fast_cpu import bfloat16_copies
from textpolicy.fast_cpu.bfloat16_copies import copied_bytes, keep_copies
from textpolicy.generation import engine
from textpolicy.generation.engine import Engine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mlx brings a fast BLAS elsewhere")
ANY_SIZE = 1 << 60


@pytest.fixture(autouse=True)
def on_a_cpu_with_compiled_loops(monkeypatch):
    monkeypatch.setattr(bfloat16_copies, "FEWEST_NUMBERS", 0)
    blas = fast_cpu.enable()
    if not blas.few_rows:
        pytest.skip(blas.few_rows_reason or blas.reason)
    with mx.stream(mx.cpu):
        yield


def linear(outputs: int, inputs: int) -> nn.Linear:
    """Return a layer without bias whose weights are bfloat16 numbers in float32."""
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.weight = mx.random.normal((outputs, inputs)).astype(mx.bfloat16).astype(mx.float32)
    mx.eval(layer.parameters())
    return layer


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13, 31, 64, 65])
@pytest.mark.parametrize("outputs", [1, 15, 33, 200])
@pytest.mark.parametrize("inputs", [1, 64, 255, 600])
def test_products_equal_those_of_numpy(rows, outputs, inputs):
    layer = linear(outputs, inputs)
    assert keep_copies(layer, ANY_SIZE) > 0
    x, start = mx.random.normal((rows, inputs)), mx.random.normal((rows, outputs))
    expected = np.array(x, np.float64) @ np.array(layer.weight, np.float64).T
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)
    added = mx.addmm(start, x, layer.weight.T, alpha=0.5, beta=2.0)
    np.testing.assert_allclose(added, 2 * np.array(start) + expected / 2, rtol=1e-4, atol=1e-4)


def test_what_a_row_gives_does_not_depend_on_the_rows_beside_it_nor_on_threads(threads_restored):
    layer = linear(770, 576)
    assert keep_copies(layer, ANY_SIZE) > 0
    x = mx.random.normal((64, 576))
    together = np.array(layer(x))
    for threads in (1, 2, 3):
        fast_cpu.set_threads(threads)
        for rows in (1, 2, 5, 7, 30):
            np.testing.assert_array_equal(layer(x[3 : 3 + rows]), together[3:][:rows])


def test_the_copy_is_what_multiplies():
    """A change of the weights' memory behind mlx's back does not reach a copy made before."""
    layer = linear(64, 128)
    assert keep_copies(layer, ANY_SIZE) > 0
    x = mx.ones((2, 128))
    before, of_many_rows = np.array(layer(x)), mx.ones((100, 128))
    np.array(layer.weight, copy=False)[:] = 0
    np.testing.assert_array_equal(layer(x), before)
    assert not np.array(layer(of_many_rows)).any()


def test_parts_and_other_views_of_a_copied_matrix_are_multiplied_rightly():
    layer = linear(96, 64)
    assert keep_copies(layer, ANY_SIZE) > 0
    weight, exact = layer.weight, np.array(layer.weight, np.float64)
    x = mx.random.normal((3, 64))
    rows = np.array(x, np.float64)
    np.testing.assert_allclose(x @ weight[:40].T, rows @ exact[:40].T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(x @ weight[7:].T, rows @ exact[7:].T, rtol=1e-4, atol=1e-4)
    half = x[:, :32] @ weight[:, :32].T
    np.testing.assert_allclose(half, rows[:, :32] @ exact[:, :32].T, rtol=1e-4, atol=1e-4)
    flat = x[:, :32] @ weight.reshape(192, 32).T
    expected = rows[:, :32] @ exact.reshape(192, 32).T
    np.testing.assert_allclose(flat, expected, rtol=1e-4, atol=1e-4)
    back = mx.random.normal((3, 96))
    np.testing.assert_allclose(
        back @ weight, np.array(back, np.float64) @ exact, rtol=1e-4, atol=1e-4
    )


def test_new_weights_are_multiplied_and_not_the_copy_of_the_old_ones():
    layer = linear(64, 64)
    assert keep_copies(layer, ANY_SIZE) > 0
    layer.weight[0] = 0.0
    layer.weight = layer.weight * 2
    x = mx.random.normal((2, 64))
    expected = np.array(x, np.float64) @ np.array(layer.weight, np.float64).T
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert keep_copies(layer, ANY_SIZE) > 0
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_numbers_that_bfloat16_cannot_hold_are_not_copied():
    layer = linear(64, 64)
    layer.weight[63, 63] = 1 + 2**-20
    before = copied_bytes()
    assert keep_copies(layer, ANY_SIZE) == 0
    assert copied_bytes() == before
    layer.weight = layer.weight.astype(mx.bfloat16)
    assert keep_copies(layer, ANY_SIZE) == 0


def test_special_numbers_stay():
    layer = linear(4, 64)
    layer.weight = mx.array([[float("inf")], [float("nan")], [-0.0], [1e-40]]) * mx.ones((4, 64))
    layer.weight = layer.weight.astype(mx.bfloat16).astype(mx.float32)
    assert keep_copies(layer, ANY_SIZE) > 0
    infinite, nothing, zero, small = np.array(layer(mx.ones((1, 64))))[0]
    assert infinite == np.inf and np.isnan(nothing) and zero == 0
    assert small == pytest.approx(64 * float(layer.weight[3, 0]), rel=1e-6, abs=1e-45)


class Tied(nn.Module):
    """A model with an embedding that is also its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(100, 64), linear(64, 64)
        table = mx.random.normal((100, 64)).astype(mx.bfloat16)
        self.embed.weight = table.astype(mx.float32)


def test_models_share_copies_of_shared_weights_which_end_with_the_last_model():
    gc.collect()
    before = copied_bytes()
    model = Tied()
    kept = keep_copies(model, ANY_SIZE)
    # Two bytes a number; the last of the panels of up to 32 outputs is filled up.
    assert 2 * (100 + 64) * 64 <= kept <= 2 * (128 + 64) * 64
    assert copied_bytes() == before + kept == before + keep_copies(model, ANY_SIZE)
    other = shared_copy(model)
    assert keep_copies(other, ANY_SIZE) == kept
    assert copied_bytes() == before + kept
    del model
    gc.collect()
    assert copied_bytes() == before + kept
    del other
    gc.collect()
    assert copied_bytes() == before


def test_copies_end_when_the_weights_are_quantized_or_do_not_fit_any_more():
    gc.collect()
    before = copied_bytes()
    model = nn.Sequential(linear(64, 64))
    assert keep_copies(model, ANY_SIZE) > 0
    assert keep_copies(model, 10) == 0
    assert copied_bytes() == before
    assert keep_copies(model, ANY_SIZE) > 0
    nn.quantize(model, group_size=64, bits=4)
    assert keep_copies(model, ANY_SIZE) == 0
    assert copied_bytes() == before


def test_a_matrix_whose_rows_are_one_array_has_no_copy():
    layer = linear(64, 64)
    layer.weight = mx.broadcast_to(layer.weight[:1], (64, 64))
    mx.eval(layer.weight)
    assert keep_copies(layer, ANY_SIZE) == 0


@only_on_a_cpu("where the default device is a GPU, no copies are kept")
def test_a_forked_process_ends_while_another_thread_multiplies():
    program = (
        "import os, threading, mlx.core as mx, mlx.nn as nn\n"
        "from textpolicy.fast_cpu.bfloat16_copies import keep_copies\n"
        "import textpolicy.fast_cpu.bfloat16_copies as copies; copies.FEWEST_NUMBERS = 0\n"
        "layer = nn.Linear(512, 4096, bias=False)\n"
        "layer.set_dtype(mx.bfloat16); layer.set_dtype(mx.float32); mx.eval(layer.weight)\n"
        "assert keep_copies(layer, 1 << 60)\n"
        "ended = threading.Event()\n"
        "def multiply():\n"
        "    with mx.stream(mx.cpu):\n"
        "        x = mx.ones((8, 512))\n"
        "        while not ended.is_set(): mx.eval(x @ layer.weight.T)\n"
        "thread = threading.Thread(target=multiply); thread.start()\n"
        "for _ in range(5):\n"
        "    if (child := os.fork()) == 0:\n"
        "        del layer; import gc, weakref; gc.collect()\n"
        "        weakref.finalize._exitfunc(); os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "ended.set(); thread.join(); print('ended')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "ended\n")


def test_a_small_model_has_no_copies(monkeypatch):
    monkeypatch.undo()
    assert keep_copies(linear(64, 64), ANY_SIZE) == 0


def test_an_embedding_beside_a_head_has_no_copy():
    model = nn.Sequential(nn.Embedding(100, 64), linear(100, 64))
    assert keep_copies(model, ANY_SIZE) <= 2 * 128 * 64


def test_a_model_that_would_take_too_much_memory_has_no_copies(monkeypatch):
    layer = linear(64, 64)
    assert keep_copies(layer, 2 * 64 * 64 - 1) == 0
    assert keep_copies(layer, 2 * 64 * 64) > 0
    asked: list[int] = []
    monkeypatch.setattr(machine, "memory_bytes", lambda: 800)
    monkeypatch.setattr(engine, "keep_copies", lambda model, most: asked.append(most))
    Engine(layer)
    assert asked == [100]
