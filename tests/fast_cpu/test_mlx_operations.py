"""Operations by compiled functions: exact, as lazy as mlx's own, and not needed."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from textpolicy.fast_cpu import exponential, mlx_operations
from textpolicy.fast_cpu.compiler import CompiledLibrary, NotCompiled
from textpolicy.fast_cpu.gradients import without_gradients
from textpolicy.fast_cpu.mlx_operations import bits_of, compiled_operation, operation_for
from textpolicy.fast_cpu.model_functions import swiglu
from textpolicy.fast_cpu.rms_norm import FastRMSNorm

pytestmark = pytest.mark.usefixtures("compiled_operations")


def spread(*shape: int) -> mx.array:
    """Return an array with small and large numbers, more than mlx computes itself."""
    return 12 * mx.random.normal(shape, key=mx.random.key(4))


@pytest.mark.parametrize(
    ("name", "exact", "largest"), [("exp", np.exp, 88.7), ("exp2", np.exp2, 127.9)]
)
def test_exponentials_are_exact_to_their_last_digits(name, exact, largest):
    x = mx.linspace(2 - largest, largest, 100_001)
    compute = operation_for(name, x)
    assert compute is not None
    expected = exact(np.array(x, np.float64))
    assert np.abs(np.array(compute(x)[0], np.float64) / expected - 1).max() < 2e-7
    special = mx.tile(mx.array([0.0, np.inf, -np.inf, np.nan, 129.0, -130.0]), 200)
    found = np.array(compute(special)[0])[:6]
    np.testing.assert_array_equal(found, [1, np.inf, 0, np.nan, np.inf, 0])


@pytest.mark.parametrize("size", [513, 1000, 2**15, 2**15 + 7])
def test_every_number_of_an_array_is_computed(size):
    """Arrays of 2^15 numbers and more are shared by threads."""
    x, y, z = spread(size), spread(size) + 1, spread(size) - 1
    names = {"exp": 1, "exp2": 1, "softmax": 1, "swiglu": 2, "swiglu_gradients": 3}
    plain = {
        "exp": lambda x: [mx.exp(x)],
        "exp2": lambda x: [mx.power(2.0, x)],
        "softmax": lambda x: [mx.softmax(x, axis=-1)],
        "swiglu": lambda x, y: [x * mx.sigmoid(x) * y],
        "swiglu_gradients": lambda x, y, z: list(
            mx.vjp(lambda x, y: x * mx.sigmoid(x) * y, [x, y], [z])[1]
        ),
    }
    for name, inputs in names.items():
        arrays = (x, y, z)[:inputs]
        expected = plain[name](*arrays)
        compute = operation_for(name, *arrays, outputs=len(expected))
        assert compute is not None
        for got, right in zip(compute(*arrays), expected, strict=True):
            np.testing.assert_allclose(got, right, rtol=2e-5, atol=1e-6)


def test_arrays_of_any_layout_are_read_in_their_order():
    whole = spread(40, 60, 3)
    for x in (whole, whole.T, whole[::2], whole[:, ::-1], mx.broadcast_to(whole[:1], (9, 60, 3))):
        np.testing.assert_allclose(exponential.exp(x), mx.exp(x), rtol=1e-5)
        np.testing.assert_allclose(exponential.softmax(x), mx.softmax(x, axis=-1), atol=1e-6)


def test_the_softmax_has_a_gradient_also_in_a_checkpoint_and_a_compiled_function():
    x, weight = spread(30, 40), spread(30, 40)

    def loss(softmax):
        return lambda x: (softmax(x) * weight).sum()

    expected = mx.grad(loss(lambda x: mx.softmax(x, axis=-1)))(x)
    ours = loss(exponential.softmax)
    np.testing.assert_allclose(mx.grad(ours)(x), expected, atol=1e-5)
    np.testing.assert_allclose(mx.grad(mx.checkpoint(ours))(x), expected, atol=1e-5)
    np.testing.assert_allclose(mx.compile(mx.grad(ours))(x), expected, atol=1e-5)


def test_an_operation_is_lazy_and_runs_in_the_order_of_the_graph():
    x = spread(1000)
    compute = operation_for("exp", x)
    assert compute is not None
    y = x
    for _ in range(50):
        y = compute(mx.minimum(y, 1.0) - 1)[0] + x
    z = np.array(x, np.float64)
    for _ in range(50):
        z = np.exp(np.minimum(z, 1.0) - 1) + np.array(x, np.float64)
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-4)


def test_short_rows_other_dtypes_and_unequal_shapes_are_left_to_mlx():
    assert operation_for("exp", mx.zeros((900, 63))) is None
    assert operation_for("exp", mx.zeros(())) is None
    for empty in ((0, 64), (3, 0)):
        assert exponential.softmax(mx.zeros(empty)).shape == empty
    assert operation_for("exp", mx.zeros((9, 64), mx.float16)) is None
    assert operation_for("swiglu", mx.zeros((9, 64)), mx.zeros((64, 9))) is None


def test_a_kernel_for_metal_is_still_refused_with_mlx_s_own_words():
    kernel = mx.fast.metal_kernel(
        name="one", input_names=["x"], output_names=["y"], source="y[0] = x[0];"
    )
    with pytest.raises(RuntimeError, match="Metal"):
        kernel(
            inputs=[mx.ones(1)],
            output_shapes=[(1,)],
            output_dtypes=[mx.float32],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )


def test_a_library_that_does_not_work_is_found_out_by_another_process(tmp_path):
    wrong = tmp_path / "wrong.so"
    wrong.write_bytes(b"\x7fELF")
    with pytest.raises(NotCompiled, match="mlx_operations does not work on this machine: OSError"):
        mlx_operations._library().try_out(wrong)


@pytest.mark.slow
def test_without_a_cpp_compiler_mlx_computes_the_same_numbers(tmp_path):
    compiler = tmp_path / "bin"
    compiler.mkdir()
    for name in ("cc", "as", "ld"):
        (found,) = [p for p in (Path("/usr/bin") / name,) if p.exists()] or pytest.skip(name)
        (compiler / name).symlink_to(found)
    program = (
        "import mlx.core as mx\n"
        "from textpolicy import fast_cpu\n"
        "from textpolicy.fast_cpu import exponential, mlx_operations\n"
        "x = mx.arange(1000) / 100\n"
        "print(fast_cpu.enable().few_rows, bool(mx.allclose(exponential.exp(x), mx.exp(x))))\n"
        "print(mlx_operations.reason_of_none())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PATH": str(compiler)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    numbers, reason = done.stdout.splitlines()
    assert numbers == "True True"
    assert reason == "no C++ compiler (c++, g++ or clang++) is installed"


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_the_norm_is_that_of_mlx_with_all_its_gradients(rows):
    plain, fast = nn.RMSNorm(600, eps=1e-3), FastRMSNorm(600, eps=1e-3)
    plain.weight = fast.weight = spread(600) / 12
    x, weight = spread(2, rows, 600), spread(2, rows, 600)

    def gradients(norm: nn.Module) -> list[mx.array]:
        def loss(w: mx.array, x: mx.array) -> mx.array:
            norm.weight = w
            return (norm(x) * weight).sum()

        return list(mx.grad(loss, argnums=(0, 1))(norm.weight, x))

    np.testing.assert_allclose(fast(x), plain(x), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(fast), gradients(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_the_norm_in_half_precision_is_left_to_mlx():
    plain, fast = nn.RMSNorm(64), FastRMSNorm(64)
    x = spread(90, 64).astype(mx.bfloat16)
    np.testing.assert_array_equal(fast(x).astype(mx.float32), plain(x).astype(mx.float32))


@pytest.mark.parametrize("width", [64, 100, 256, 576])
def test_what_a_row_gives_does_not_depend_on_the_rows_beside_it(width):
    x, y = spread(64, 1, width), spread(64, 1, width)
    norm = FastRMSNorm(width)
    for function in (
        lambda x, y: norm(x),
        lambda x, y: exponential.softmax(x),
        lambda x, y: exponential.exp(x),
        swiglu,
    ):
        together = np.array(function(x, y))
        for row in (0, 17, 63):
            alone = function(x[row : row + 1], y[row : row + 1])
            np.testing.assert_array_equal(alone, together[row : row + 1])


@pytest.mark.parametrize("hidden", [1, 5, 16, 31])
def test_hidden_scores_before_a_row_change_no_bit_of_its_softmax(hidden):
    x = spread(9, 77)
    padded = mx.concatenate([mx.full((9, hidden), -1e30), x], axis=-1)
    found = np.array(exponential.softmax(padded))
    np.testing.assert_array_equal(found[:, hidden:], np.array(exponential.softmax(x)))


def test_a_failed_trial_is_remembered_and_its_file_named(tmp_path):
    library = CompiledLibrary(
        name="trial",
        language="C",
        compilers=("cc", "gcc"),
        sources=("elementwise.c", "few_rows.c", "bfloat16_copies.c"),
        headers=("loops.h",),
        options=(("-O0", "-pthread"),),
        trial="raise SystemExit('a trial that fails')",
    )
    with pytest.raises(NotCompiled, match="trial does not work on this machine: a trial that"):
        library.compiled(tmp_path)
    (kept,) = tmp_path.iterdir()
    with pytest.raises(NotCompiled, match=f"a trial that fails; to try again, remove {kept}"):
        library.compiled(tmp_path)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[::2, 64:],
        lambda x: x[:, ::-1],
        lambda x: x.reshape(4, 32, 256).transpose(1, 0, 2),
        lambda x: mx.broadcast_to(x[:1], (50, 256)),
        lambda x: mx.broadcast_to(x[:, :1], (128, 256)),
    ],
)
def test_arrays_whose_numbers_are_not_side_by_side_are_read_as_they_are(view):
    x = view(spread(128, 256))
    compute = operation_for("exp", x)
    assert compute is not None
    np.testing.assert_allclose(np.array(compute(x)[0]), np.exp(np.array(x)), rtol=3e-7)


def test_values_are_computed_without_their_gradient_only_inside_the_block():
    x, y = spread(3, 256), spread(3, 256) + 1

    def loss(x: mx.array) -> mx.array:
        return swiglu(x, y).sum()

    expected = mx.grad(loss)(x)
    with without_gradients():
        assert mx.array_equal(swiglu(x, y), swiglu(x, y))
        with pytest.raises(ValueError, match="vjp"):
            mx.eval(mx.grad(loss)(x))
    assert mx.array_equal(mx.grad(loss)(x), expected)


def changing(inputs: int = 3, outputs: int = 3, changed: int = 2):
    """Return an operation that changes arrays. It is never computed here, for nothing fits."""
    return compiled_operation("block", inputs, outputs, as_stored=True, changed=changed)


SHAPE = 2, 3, 8, 4
FITTING = mx.zeros((2, 1, 64)), mx.zeros(SHAPE), mx.zeros(SHAPE)
MISFITS = {
    "half precision": (FITTING[0], mx.zeros(SHAPE, mx.bfloat16), FITTING[2]),
    "whole numbers": (*FITTING[:2], mx.zeros(SHAPE, mx.int32)),
    "another length": (FITTING[0], mx.zeros((2, 3, 9, 4)), FITTING[2]),
    "fewer axes": (*FITTING[:2], mx.zeros((6, 8, 4))),
    "a number": (FITTING[0], mx.array(1.0), FITTING[2]),
    "one array less": FITTING[:2],
    "one array more": (*FITTING, FITTING[0]),
    "no array": (),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_arrays_that_cannot_be_changed_are_refused(misfit):
    with pytest.raises(ValueError, match="other arrays than it takes"):
        changing()(MISFITS[misfit], [(2, 1, 64), SHAPE, SHAPE], [0])


@pytest.mark.parametrize(
    ("outputs", "changed"), [(1, 1), (2, 2), (3, 3), (3, 10**6), (5, 2)], ids=str
)
def test_more_changed_arrays_than_there_are_and_too_many_outputs_are_refused(outputs, changed):
    operation = changing(outputs=outputs, changed=changed)
    with pytest.raises(ValueError, match="other arrays than it takes"):
        operation(FITTING, [(2, 1, 64), SHAPE, SHAPE, SHAPE, SHAPE][:outputs], [0])


@pytest.mark.parametrize("shapes", [[], [(2, 1, 64)], [(2, 1, 64), SHAPE], [SHAPE] * 4], ids=len)
def test_another_number_of_shapes_is_refused(shapes):
    with pytest.raises(ValueError, match="other arrays than it takes"):
        changing()(FITTING, shapes, [0])


def test_too_many_numbers_and_arrays_are_refused():
    x = spread(64)
    with pytest.raises(ValueError, match="other arrays than it takes"):
        compiled_operation("exp", 1)([x], [x.shape], [64] * 33)
    (y,) = compiled_operation("exp", 1)([x], [x.shape], [64] * 32)
    np.testing.assert_allclose(y, np.exp(np.array(x)), rtol=3e-7)
    with pytest.raises(ValueError, match="other arrays than it takes"):
        compiled_operation("exp", 71)([x] * 71, [x.shape], [64])


def test_bits_of_a_number_are_those_of_its_float32():
    for number in (0.0, 1.0, -2.5, 1e-6, 1e-12, 3e38, float("inf")):
        assert struct.pack("<i", bits_of(number)) == struct.pack("<f", number)
