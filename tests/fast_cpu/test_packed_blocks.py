"""Blocks whose weights are packed compute steps by one operation, right after every change."""

import copy
import threading
from collections.abc import Callable, Generator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen2, qwen3

from tests.fast_cpu.arrays import assert_close, normal
from tests.fast_cpu.test_decoder_block import STEP, adapt, next_position, plain_blocks
from tests.tiny import SIZES, randomized
from textpolicy import fast_cpu
from textpolicy.adapters import AdapterConfig, AdapterContainer, dequantize, quantize
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.container import shared_copy
from textpolicy.adapters.quantization.nf4 import NF4Linear, unpack_nf4
from textpolicy.adapters.quantization.packed_product import CPUQuantizedLinear, use_fast_products
from textpolicy.fast_cpu import decoder_block
from textpolicy.fast_cpu.gradients import without_gradients
from textpolicy.fast_cpu.model_functions import use_fast_functions
from textpolicy.fast_cpu.packed_weights import MOST_ROWS
from textpolicy.fast_cpu.rotary import one_step
from textpolicy.fast_cpu.weight_values import keep_weight_values
from textpolicy.generation.decode import decode
from textpolicy.generation.decoding_batch import DecodingCache
from textpolicy.types import Sampling

pytestmark = pytest.mark.usefixtures("compiled_operations", "kept_values")

COUNTED = decoder_block

WHOLE_ROW = -1
PAST, MOST_TRIED = 7, 100
ROWS = [1, 2, 7, 8, 9, 33, MOST_ROWS]
KINDS = {
    "llama": (llama, {}),
    "llama with biases": (llama, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (qwen2, {}),
    "qwen3": (qwen3, {"head_dim": 32}),
}
FORMATS = [
    *[("affine", bits, size) for bits in (4, 8) for size in (32, 64, 128)],
    *[("nf4", 4, size) for size in (32, 64, 128, WHOLE_ROW)],
]
MODES = [("affine", 4, 32), ("affine", 8, 32), ("nf4", 4, 32)]
LINEARS = [
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
]


@pytest.fixture
def kept_values() -> Generator[None]:
    """Keep what a test's blocks compute of their weights, so that each change must be noticed."""
    with keep_weight_values({}):
        yield


def float_model(kind: str, *, layers: int = 1, seed: int = 0, **sizes: int) -> nn.Module:
    models, options = KINDS[kind]
    args = {"model_type": kind, "tie_word_embeddings": True, "num_hidden_layers": layers}
    args |= SIZES | options | sizes
    model = randomized(models.Model(models.ModelArgs(**args)), seed)
    use_fast_functions(model)
    return model.eval()


def packed_model(kind: str, mode: str, bits: int, group_size: int, **options: int) -> nn.Module:
    model = float_model(kind, **options)
    quantize(model, bits, group_size, mode)
    return model


def layer_at(block: nn.Module, path: str) -> nn.Module:
    part, name = path.split(".")
    return block[part][name]


def filled_cache(block: nn.Module, rows: int) -> DecodingCache:
    """Return a cache of some positions, in which each row has its own."""
    attention, cache = block.self_attn, DecodingCache([0] * rows)
    width = attention.rope.dims
    shape = MOST_TRIED, attention.n_kv_heads, PAST, width
    cache.update_and_fetch(*(normal(*shape, seed=seed)[:rows] for seed in (1, 2)))
    return cache


def step(block: nn.Module, rows: int, mask: mx.array | None = None) -> np.ndarray:
    """Return what a block gives for a position of so many rows."""
    hidden = len(block.input_layernorm.weight)
    cache = filled_cache(block, rows)
    x = normal(MOST_TRIED, 1, hidden, seed=3)[:rows]
    return np.array(next_position(block, x, cache, mask))


def plain_step(block: nn.Module, rows: int, mask: mx.array | None = None) -> np.ndarray:
    with plain_blocks():
        return step(block, rows, mask)


def float_weight(layer: nn.Module) -> np.ndarray:
    """Return the weight of a layer in float64, with its LoRA or DoRA."""
    if "lora_a" in layer:
        factors = (layer[name].astype(mx.float32) for name in ("lora_a", "lora_b"))
        a, b = (np.array(one, np.float64) for one in factors)
        weight = float_weight(layer.base) + layer.scale * (a @ b).T
        if "m" not in layer:
            return weight
        norms = np.linalg.norm(weight, axis=-1, keepdims=True)
        return weight / norms * np.array(layer.m, np.float64)[:, None]
    if isinstance(layer, NF4Linear):
        return np.array(unpack_nf4(layer.weight, layer.scales), np.float64)
    if isinstance(layer, nn.QuantizedLinear):
        groups = [layer.scales, *([layer.biases] if "biases" in layer else [])]
        if layer.mode == "affine":
            groups = [one.astype(mx.float32) for one in groups]
        options = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        weight = mx.dequantize(layer.weight, *groups, **options)
        return np.array(weight.astype(mx.float32), np.float64)
    return np.array(layer.weight, np.float64)


def bias_of(layer: nn.Module) -> np.ndarray:
    base = layer.base if "lora_a" in layer else layer
    if "bias" not in base:
        return np.zeros(1)
    return np.array(base.bias.astype(mx.float32), np.float64)


def exact_step(block: nn.Module, rows: int) -> np.ndarray:
    """Return the same as `step`, in float64 by numpy alone."""
    attention, mlp = block.self_attn, block.mlp

    def linear(layer: nn.Module, x: np.ndarray) -> np.ndarray:
        return x @ float_weight(layer).T + bias_of(layer)

    def norm(layer: nn.RMSNorm, x: np.ndarray) -> np.ndarray:
        mean = (x**2).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean + layer.eps) * np.array(layer.weight, np.float64)

    def turned(x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        angle = PAST * attention.rope.base ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        turned = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        return np.concatenate(turned, axis=-1)

    hidden = len(block.input_layernorm.weight)
    x = np.array(normal(MOST_TRIED, 1, hidden, seed=3)[:rows], np.float64)
    inputs = norm(block.input_layernorm, x)
    heads = attention.n_heads, attention.n_kv_heads, attention.n_kv_heads
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = (
        linear(layer, inputs).reshape(rows, count, 1, -1)
        for layer, count in zip(layers, heads, strict=True)
    )
    if "q_norm" in attention:
        q, k = norm(attention.q_norm, q), norm(attention.k_norm, k)
    cache = filled_cache(block, rows)
    past = (np.array(one[..., :PAST, :], np.float64) for one in (cache.keys, cache.values))
    keys, values = (
        np.concatenate([before, new], axis=2).repeat(heads[0] // heads[1], axis=1)
        for before, new in zip(past, (turned(k), v), strict=True)
    )
    scores = attention.scale * turned(q) @ keys.swapaxes(-1, -2)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    attended = weights / weights.sum(axis=-1, keepdims=True) @ values
    x = x + linear(attention.o_proj, attended.reshape(rows, 1, -1))
    inputs = norm(block.post_attention_layernorm, x)
    gate, up = linear(mlp.gate_proj, inputs), linear(mlp.up_proj, inputs)
    return x + linear(mlp.down_proj, gate / (1 + np.exp(-gate)) * up)


def check(block: nn.Module, rows: int) -> None:
    """Compare a step with the block's own code, and with float64."""
    found = step(block, rows)
    assert_close(found, plain_step(block, rows))
    assert_close(found, exact_step(block, rows))


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_packed_blocks_are_exact(kind, mode, bits, group_size, compiled_calls):
    model = packed_model(
        kind, mode, bits, group_size, hidden_size=128, intermediate_size=256, num_attention_heads=4
    )
    block = model.layers[0]
    for rows in ROWS:
        check(block, rows)
    assert compiled_calls == STEP * len(ROWS)
    adapt(model, LoRARule(rank=8))
    for rows in ROWS:
        check(block, rows)
    assert compiled_calls == STEP * 2 * len(ROWS)


ADAPTED = ".*(q_proj|v_proj|o_proj|up_proj|down_proj)"


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("rank", [1, 3, 5, 17, 64])
@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_each_rank_is_exact_over_packed_weights(
    mode, bits, group_size, rank, adapter, compiled_calls
):
    model = packed_model("qwen2", mode, bits, group_size)
    adapt(model, LoRARule(rank=rank, kind=adapter, module_path=ADAPTED))
    for rows in (1, 6, 50):
        check(model.layers[0], rows)
    assert compiled_calls == STEP * 3


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["llama with biases", "qwen3"])
@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_a_new_adapter_changes_no_bit_of_a_step(
    mode, bits, group_size, kind, adapter, compiled_calls
):
    model = packed_model(kind, mode, bits, group_size)
    base = step(model.layers[0], 9)
    AdapterContainer.from_model(model, AdapterConfig(rank=5, scale=2.0, kind=adapter))
    np.testing.assert_array_equal(step(model.layers[0], 9), base)
    assert compiled_calls == STEP * 2


WIDTHS = [
    # The words of an output fill no vector, and the groups are whole ones.
    *[(mode, bits, 32, 96, 160, 3) for mode, bits, _ in MODES],
    *[(mode, bits, 32, 32, 32, 1) for mode, bits, _ in MODES],
    *[(mode, bits, 64, 192, 320, 3) for mode, bits, _ in MODES],
    *[("affine", bits, 128, 384, 128, 4) for bits in (4, 8)],
    # A row of one group may have any multiple of eight numbers.
    *[
        ("nf4", 4, WHOLE_ROW, *sizes)
        for sizes in ((72, 200, 3), (24, 8, 3), (8, 16, 1), (40, 56, 5))
    ],
    ("nf4", 4, WHOLE_ROW, 136, 264, 1),
]


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("mode", "bits", "group_size", "hidden", "inner", "heads"), WIDTHS)
def test_widths_that_fill_no_vector_are_exact(
    mode, bits, group_size, hidden, inner, heads, rank, compiled_calls
):
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads}
    model = packed_model("qwen2", mode, bits, group_size, **sizes)
    if rank:
        adapt(model, LoRARule(rank=rank))
    for rows in (1, 3, 8, 9, MOST_ROWS):
        check(model.layers[0], rows)
    assert compiled_calls == STEP * 5


@pytest.mark.parametrize("path", LINEARS)
@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_one_layer_may_be_packed_among_floats(path, mode, bits, group_size, compiled_calls):
    model = float_model("qwen3")
    quantize(model, bits, group_size, mode, predicate=lambda name, _: name.endswith(path))
    block = model.layers[0]
    for rows in (1, 9, MOST_ROWS):
        check(block, rows)
    assert compiled_calls == STEP * 3
    assert_close(step(block, MOST_ROWS + 1), exact_step(block, MOST_ROWS + 1))
    assert compiled_calls == STEP * 3


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_more_rows_are_computed_by_the_block_itself(mode, bits, group_size, rank, compiled_calls):
    model = packed_model("llama", mode, bits, group_size)
    if rank:
        adapt(model, LoRARule(rank=rank))
    for rows in (MOST_ROWS + 1, 100):
        assert_close(step(model.layers[0], rows), exact_step(model.layers[0], rows))
    assert not compiled_calls
    check(model.layers[0], MOST_ROWS)
    assert compiled_calls == STEP
    # Adapters over float weights have no such limit.
    model = float_model("llama")
    check(model.layers[0], 100)
    assert compiled_calls == STEP * 2


@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
def test_a_row_gives_the_same_bits_beside_any_rows_and_with_any_threads(
    mode, bits, group_size, compiled_calls, threads_restored
):
    model = packed_model(
        "qwen3", mode, bits, group_size, hidden_size=256, intermediate_size=384, head_dim=64
    )
    block, counts = model.layers[0], (1, 2, 3, 5, 7, 8, 9, 20, 33)
    together = step(block, MOST_ROWS)
    for rows in counts:
        fast_cpu.set_threads(1 + rows % 3)
        np.testing.assert_array_equal(step(block, rows), together[:rows])
    assert compiled_calls == STEP * (1 + len(counts))


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_special_numbers_of_a_row_stay_in_the_row(mode, bits, group_size, compiled_calls):
    model = packed_model("qwen3", mode, bits, group_size)
    adapt(model, LoRARule(rank=3))
    block, x = model.layers[0], normal(9, 1, 64)
    broken = mx.array(x)
    broken[4, 0, 5], broken[7, 0, 63] = mx.nan, mx.inf
    others = np.array([0, 1, 2, 3, 5, 6, 8])
    clean, found = (
        np.array(next_position(block, one, filled_cache(block, 9))) for one in (x, broken)
    )
    assert not np.isfinite(found[[4, 7]]).all(axis=-1).any()
    np.testing.assert_allclose(found[others], clean[others], rtol=1e-5, atol=1e-6)
    assert compiled_calls == STEP * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_left_padding_is_hidden_from_each_row(kind, mode, bits, group_size, compiled_calls):
    model = packed_model(kind, mode, bits, group_size, layers=2)
    adapt(model, LoRARule(rank=3))
    paddings = [4, 0, 8, 1, 0, 0, 2, 3, 5]
    tokens = mx.random.randint(0, 96, (9, 13), key=mx.random.key(2))

    def logits(tokens: mx.array) -> np.ndarray:
        caches = [DecodingCache(paddings) for _ in model.layers]
        results: list[mx.array] = []
        with without_gradients():
            model(tokens[:, :9], cache=caches)
            for at in range(9, 13):
                with one_step([layer.offset for layer in caches]):
                    results.append(model(tokens[:, at : at + 1], cache=caches))
        return np.array(mx.concatenate(results, axis=1))

    found = logits(tokens)
    assert compiled_calls == STEP * 8
    with plain_blocks():
        assert_close(found, logits(tokens))
    # What stands under the padding changes nothing.
    hidden = mx.arange(13) < mx.array(paddings)[:, None]
    np.testing.assert_allclose(found, logits(mx.where(hidden, 1, tokens)), atol=1e-5)


VIEWS: dict[str, Callable[[mx.array], mx.array]] = {
    "transposed": lambda w: mx.contiguous(w.T).T,
    "with gaps": lambda w: mx.concatenate([w, w], axis=-1)[:, : w.shape[1]],
    "backwards": lambda w: mx.contiguous(w[::-1])[::-1],
    "part of another": lambda w: mx.concatenate([w[:1], w])[1:],
    # The codes of NF4 are bytes, and these begin at an odd one.
    "after one number": lambda w: mx.concatenate([w[0, :1], w.flatten()])[1:].reshape(w.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["weight", "scales", "biases"])
@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_arrays_are_read_as_they_are_stored(mode, bits, group_size, name, view, compiled_calls):
    block = packed_model("qwen2", mode, bits, group_size).layers[0]
    expected = step(block, 9)
    for path in LINEARS:
        layer = layer_at(block, path)
        if name in layer:
            layer[name] = VIEWS[view](layer[name])
    np.testing.assert_array_equal(step(block, 9), expected)
    assert compiled_calls == STEP * 2


def test_several_threads_may_take_the_first_step_of_a_block():
    made = [packed_model("qwen3", *one) for one in MODES]
    blocks = [model.layers[0] for model in made]
    expected = [step(copy.deepcopy(block), 9) for block in blocks]
    wrong: list[bool] = []

    def repeat(number: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)), keep_weight_values({}):
            for _ in range(20):
                wrong.append(not np.array_equal(step(blocks[number], 9), expected[number]))

    threads = [threading.Thread(target=repeat, args=(n % 3,), daemon=True) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [False] * 120


def test_a_mask_that_is_added_is_left_to_other_operations():
    block = packed_model("qwen2", "nf4", 4, 32).layers[0]
    mask = mx.where(mx.arange(PAST + 1) == 2, -1e9, 0.0)[None, None, None]
    found = step(block, 3, mask)
    assert_close(found, plain_step(block, 3, mask))
    assert np.abs(found - step(block, 3)).max() > 1e-3


def in_dtype(dtype: mx.Dtype) -> Callable[[nn.Module], None]:
    """Return a function that stores the scales and biases of groups in this dtype."""

    def change(model: nn.Module) -> None:
        quantize(model, 4, 32)
        for layer in model.modules():
            if isinstance(layer, nn.QuantizedLinear):
                layer.scales, layer.biases = layer.scales.astype(dtype), layer.biases.astype(dtype)

    return change


OTHERS: dict[str, Callable[[nn.Module], object]] = {
    **{f"{bits} bits": lambda model, bits=bits: quantize(model, bits, 32) for bits in (2, 3, 5, 6)},
    "mxfp4": lambda model: quantize(model, 4, mode="mxfp4"),
    "mxfp8": lambda model: quantize(model, 8, mode="mxfp8"),
    "scales in bfloat16": in_dtype(mx.bfloat16),
    "scales in float16": in_dtype(mx.float16),
}


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_left_to_the_block_itself(name, rank, compiled_calls):
    model = float_model("qwen2")
    OTHERS[name](model)
    if rank:
        adapt(model, LoRARule(rank=rank))
    block = model.layers[0]
    for rows in (1, 2, 33):
        assert_close(step(block, rows), exact_step(block, rows), within=1e-4)
    assert not compiled_calls


@pytest.mark.parametrize("path", LINEARS)
def test_one_layer_of_another_format_leaves_the_block_to_itself(path, compiled_calls):
    model = packed_model("llama", "nf4", 4, 32)
    layer = layer_at(model.layers[0], path)
    layer.scales = layer.scales.astype(mx.float16)
    assert_close(step(model.layers[0], 5), exact_step(model.layers[0], 5))
    assert not compiled_calls


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", ["bias", "lora_a", "lora_b"])
@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_other_dtypes_beside_packed_weights_leave_the_block_to_itself(
    mode, bits, group_size, name, dtype, compiled_calls
):
    model = packed_model("llama with biases", mode, bits, group_size)
    adapt(model, LoRARule(rank=3))
    layer = model.layers[0].mlp.gate_proj
    owner = layer.base if name == "bias" else layer
    owner[name] = owner[name].astype(dtype)
    for rows in (1, 33):
        right = exact_step(model.layers[0], rows)
        assert_close(step(model.layers[0], rows), right, within=1e-2)
    assert not compiled_calls


def check_change(model: nn.Module, change: Callable[[], object], rows: int = 5) -> None:
    """Compute a step, change the model, and compare the next step with the changed weights."""
    block = model.layers[0]
    before = step(block, rows)
    change()
    check(block, rows)
    assert np.abs(step(block, rows) - before).max() > 1e-3


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("path", LINEARS)
@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_the_next_step_has_a_new_array(mode, bits, group_size, path, adapted, compiled_calls):
    model = packed_model("llama with biases", mode, bits, group_size)
    layer = layer_at(model.layers[0], path)
    if adapted:
        adapt(model, LoRARule(rank=3))
    names = ["weight", "scales", "bias", *(["biases"] if mode == "affine" else [])]
    for name in names:
        new = layer[name][::-1] if name == "weight" else 3 * layer[name]
        check_change(model, lambda name=name, new=new: setattr(layer, name, new))
    assert compiled_calls == STEP * 3 * len(names)


@pytest.mark.parametrize("name", ["weight", "scales", "biases"])
def test_the_next_step_has_what_is_written_into_an_array(name, compiled_calls):
    model = packed_model("llama", "affine", 4, 32)
    layer = model.layers[0].mlp.up_proj

    def change() -> None:
        layer[name][3:90] = layer[name][:87] * (1 if name == "weight" else 5)

    check_change(model, change)
    check_change(model, lambda: layer.scales.__imul__(3))
    assert compiled_calls == STEP * 6


def test_an_array_may_go_and_come_back(compiled_calls):
    model = packed_model("llama", "affine", 8, 32)
    block, layer = model.layers[0], model.layers[0].mlp.gate_proj
    first, others = step(block, 4), layer.scales * 2
    arrays = [layer.scales, layer.scales.astype(mx.float16), others]
    results = []
    for one in (0, 1, 2, 0, 2, 1, 0):
        layer.scales = arrays[one]
        results.append(step(block, 4))
        assert_close(results[-1], exact_step(block, 4), within=1e-4)
    np.testing.assert_array_equal(results[0], first)
    np.testing.assert_array_equal(results[3], first)
    np.testing.assert_array_equal(results[6], first)
    np.testing.assert_array_equal(results[2], results[4])
    assert compiled_calls == STEP * 6


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_the_next_step_has_weights_that_are_loaded(mode, bits, group_size, compiled_calls):
    model, other = (packed_model("qwen3", mode, bits, group_size, seed=seed) for seed in (0, 9))
    check_change(model, lambda: model.load_weights(tree_flatten(other.parameters())))
    np.testing.assert_array_equal(step(model.layers[0], 5), step(other.layers[0], 5))
    assert compiled_calls == STEP * 5


def test_a_layer_may_get_another_format_under_the_same_name(compiled_calls):
    block = packed_model("llama", "affine", 4, 32).layers[0]
    layer = block.mlp.down_proj
    weight = normal(64, 128, seed=8) / 10

    def store(bits: int, group_size: int) -> None:
        layer.weight, layer.scales, layer.biases = mx.quantize(weight, group_size, bits)
        layer.bits, layer.group_size = bits, group_size

    for bits, group_size in [(4, 64), (8, 64), (4, 128), (8, 128), (8, 32), (4, 32)]:
        store(bits, group_size)
        check(block, 5)
    assert compiled_calls == STEP * 6
    store(6, 32)
    check(block, 5)
    assert compiled_calls == STEP * 6


def test_a_layer_may_be_replaced_by_another(compiled_calls):
    model = packed_model("llama", "affine", 4, 32)
    weight = nn.Linear(64, 128, bias=False)
    others: list[Callable[[], nn.Module]] = [
        lambda: NF4Linear.from_linear(weight, 32),
        lambda: nn.Linear(64, 128),
        lambda: fast(weight.to_quantized(64, 8)),
        lambda: NF4Linear(weight.weight, WHOLE_ROW),
        lambda: fast(nn.Linear(64, 128).to_quantized(32, 4)),
    ]
    for make in others:
        check_change(model, lambda make=make: setattr(model.layers[0].mlp, "up_proj", make()))
    assert compiled_calls == STEP * 15
    model.layers[0].mlp.up_proj = weight.to_quantized(32, 4)
    check(model.layers[0], 5)
    assert compiled_calls == STEP * 15


def fast(layer: nn.Module) -> nn.Module:
    """Return a quantized layer as loaded models have it."""
    model = nn.Sequential(layer)
    use_fast_products(model)
    assert type(model.layers[0]) is CPUQuantizedLinear
    return model.layers[0]


def test_a_model_may_be_made_of_floats_and_packed_again(compiled_calls):
    model = packed_model("qwen2", "affine", 4, 32)
    block = model.layers[0]
    check(block, MOST_ROWS)
    dequantize(model, mx.float32)
    check(block, 70)
    for mode, bits, group_size in [("nf4", 4, 64), ("affine", 8, 64)]:
        quantize(model, bits, group_size, mode)
        check(block, 5)
        assert_close(step(block, 70), exact_step(block, 70))
        dequantize(model, mx.float32)
    assert compiled_calls == STEP * 4


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_the_next_step_has_another_adapter(mode, bits, group_size, adapter, compiled_calls):
    model = packed_model("llama with biases", mode, bits, group_size)
    base = step(model.layers[0], 5)
    container = adapt(model, LoRARule(rank=3, kind=adapter))
    check(model.layers[0], 5)
    arrays = {name: 2 * array for name, array in container.parameters().items()}
    check_change(model, lambda: container.swap(arrays))
    axes = {"lora_a": 1, "lora_b": 0}
    wider = {
        name: mx.concatenate([array, array], axis=axes[last]) if last in axes else array
        for name, array in arrays.items()
        for last in name.split(".")[-1:]
    }
    check_change(model, lambda: container.swap(wider))
    container.add("other", container.adapter())
    container.swap(arrays)
    check_change(model, lambda: container.activate("other"))
    layer = next(iter(container.layers().values()))
    check_change(model, lambda: layer.set_scale(9.0))
    with container.disabled():
        np.testing.assert_array_equal(step(model.layers[0], 5), base)
    check_change(model, lambda: container.unload())
    np.testing.assert_array_equal(step(model.layers[0], 5), base)
    check_change(model, lambda: container.load(model))
    assert compiled_calls == STEP * (4 + 3 * 6)


def scaled(layer: nn.Module, factor: float = 3) -> None:
    layer.scales = layer.scales * factor


def written(layer: nn.Module) -> None:
    layer.scales[:20] = layer.scales[:20] * 3


@pytest.mark.parametrize("change", [scaled, written])
@pytest.mark.parametrize("is_asked_first", [True, False])
@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_a_deep_copy_and_its_model_change_apart(
    mode, bits, group_size, is_asked_first, change, compiled_calls
):
    model = packed_model("llama", mode, bits, group_size)
    if is_asked_first:
        step(model.layers[0], 5)
    copied = copy.deepcopy(model)
    before = step(model.layers[0], 5)
    np.testing.assert_array_equal(step(copied.layers[0], 5), before)
    check_change(copied, lambda: change(copied.layers[0].mlp.up_proj))
    np.testing.assert_array_equal(step(model.layers[0], 5), before)
    changed = step(copied.layers[0], 5)
    check_change(model, lambda: change(model.layers[0].mlp.down_proj))
    np.testing.assert_array_equal(step(copied.layers[0], 5), changed)
    assert compiled_calls == STEP * (11 + is_asked_first)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_a_shared_copy_and_its_model_change_apart(mode, bits, group_size, adapted, compiled_calls):
    model = packed_model("qwen3", mode, bits, group_size)
    container = adapt(model, LoRARule(rank=3)) if adapted else None
    before = step(model.layers[0], 5)
    copied = shared_copy(model)
    np.testing.assert_array_equal(step(copied.layers[0], 5), before)
    layer = copied.layers[0].mlp.up_proj
    check_change(copied, lambda: scaled(layer.base if adapted else layer))
    np.testing.assert_array_equal(step(model.layers[0], 5), before)
    if container:
        theirs = AdapterContainer.of(copied)
        assert theirs is not None
        check_change(
            copied, lambda: theirs.swap({n: 2 * a for n, a in theirs.parameters().items()})
        )
        np.testing.assert_array_equal(step(model.layers[0], 5), before)
        check_change(copied, lambda: theirs.unload())
        np.testing.assert_array_equal(step(model.layers[0], 5), before)
    dequantize(AdapterContainer.of(copied).unload() if AdapterContainer.of(copied) else copied)
    check(copied.layers[0], 5)
    np.testing.assert_array_equal(step(model.layers[0], 5), before)
    assert {*compiled_calls} == {*STEP}


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_a_compiled_function_sees_the_change_of_an_array(mode, bits, group_size, compiled_calls):
    """In it, the layers hold arrays without numbers, which must not be kept."""
    block, x = packed_model("qwen2", mode, bits, group_size).layers[0], normal(3, 1, 64)

    def compute(x: mx.array) -> mx.array:
        return next_position(block, x, filled_cache(block, 3))

    compiled = mx.compile(compute, inputs=[block.state])
    for factor in (1, 2, 3):
        scaled(block.mlp.up_proj, factor)
        np.testing.assert_array_equal(np.array(compiled(x)), np.array(compute(x)))
        check(block, 3)
    assert compiled_calls == STEP * 7


def test_what_is_kept_of_a_block_is_no_parameter():
    model = packed_model("llama", "affine", 4, 32)
    names = [name for name, _ in tree_flatten(model.parameters())]
    step(model.layers[0], 2)
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    assert all("norm" in name for name, _ in tree_flatten(model.trainable_parameters()))


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_gradients_never_go_through_a_step(mode, bits, group_size, compiled_calls):
    model = packed_model("qwen3", mode, bits, group_size)
    adapt(model, LoRARule(rank=3))
    block, x = model.layers[0], normal(5, 1, 64)

    def loss(x: mx.array) -> mx.array:
        return mx.sin(block(x, None, filled_cache(block, 5))).sum()

    def loss_of_factors(a: mx.array) -> mx.array:
        block.mlp.up_proj.lora_a = a
        return loss(x)

    step(block, 5)
    compiled_calls.clear()
    factor = block.mlp.up_proj.lora_a
    found = mx.grad(loss)(x), mx.grad(loss_of_factors)(factor)
    block.mlp.up_proj.lora_a = factor
    assert not compiled_calls
    with plain_blocks():
        right = mx.grad(loss)(x), mx.grad(loss_of_factors)(factor)
    for one, other in zip(found, right, strict=True):
        assert np.abs(np.array(one)).max() > 0
        np.testing.assert_array_equal(np.array(one), np.array(other))


PROMPTS = [[5, 17, 3, 44, 60, 2], [9], [1, 2, 3], [7] * 40]


def decoded(model: nn.Module, **options: int) -> list[tuple[list[int], list[float]]]:
    groups = decode(
        model,
        PROMPTS,
        sampling=Sampling(max_tokens=24),
        stop=lambda _: None,
        seed=3,
        max_rows=None,
        **options,
    )
    return [(row.tokens, row.logprobs) for group in groups for row in group]


@pytest.mark.parametrize("adapter", [None, "lora", "dora"])
@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_models_decode_the_same_tokens(kind, mode, bits, group_size, adapter, compiled_calls):
    model = packed_model(kind, mode, bits, group_size, layers=2)
    if adapter:
        adapt(model, LoRARule(rank=3, kind=adapter))
    found = decoded(model, n=3)
    assert {*compiled_calls} == {*STEP} and len(compiled_calls) >= 2 * 23
    with plain_blocks():
        expected = decoded(model, n=3)
    for (tokens, logprobs), (right, others) in zip(found, expected, strict=True):
        assert tokens == right
        np.testing.assert_allclose(logprobs, others, atol=2e-4)


def test_more_rows_than_the_limit_are_decoded_by_the_blocks_themselves(compiled_calls):
    model = packed_model("qwen2", "nf4", 4, 32)
    found = decoded(model, n=17)
    assert not compiled_calls
    with plain_blocks():
        expected = decoded(model, n=17)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    decoded(model, n=16)
    assert {*compiled_calls} == {*STEP}


def test_the_next_step_has_an_adapter_that_was_trained(compiled_calls):
    model = packed_model("llama", "affine", 8, 32)
    container = adapt(model, LoRARule(rank=3))
    step(model.layers[0], 5)
    compiled_calls.clear()
    x = mx.array([[1, 2, 3, 4]])
    gradients = nn.value_and_grad(model, lambda: mx.sin(model(x)).sum())()[1]
    assert not compiled_calls
    check_change(model, lambda: model.update(negated(gradients)))
    assert container.parameters().keys() == dict(tree_flatten(gradients)).keys()


def negated(tree):
    if isinstance(tree, mx.array):
        return -tree
    if isinstance(tree, list):
        return [negated(one) for one in tree]
    return {name: negated(one) for name, one in tree.items()}


def doubled(layer: nn.Module) -> None:
    """Let a layer be of a class that computes something else with the same arrays."""
    plain = type(layer)

    class Doubled(plain):
        def __call__(self, x):
            return 2 * super().__call__(x)

    layer.__class__ = Doubled


@pytest.mark.parametrize("adapter", [None, "lora", "dora"])
@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_a_class_made_of_a_known_one_is_called_itself(
    mode, bits, group_size, adapter, compiled_calls
):
    model = packed_model("llama", mode, bits, group_size)
    if adapter:
        adapt(model, LoRARule(rank=4, kind=adapter))
    block = model.layers[0]
    step(block, 3)
    compiled_calls.clear()
    doubled(block.mlp.up_proj)
    assert_close(step(block, 3), plain_step(block, 3))
    assert not compiled_calls


def of_another_width(outputs: int, inputs: int) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        block.mlp.up_proj = fast(nn.Linear(inputs, outputs, bias=False).to_quantized(32, 4))

    return change


def cut(path: str, name: str, count: int) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        layer = layer_at(block, path)
        layer[name] = layer[name][:count]

    return change


MISFITS = {
    "more inputs": of_another_width(128, 96),
    "fewer inputs": of_another_width(128, 32),
    "other outputs": of_another_width(96, 64),
    "fewer queries": cut("self_attn.q_proj", "lora_b", 0),
    "a cut factor": cut("mlp.gate_proj", "lora_a", 32),
    "a cut bias": cut("self_attn.k_proj", "bias", 1),
    "a norm of one number": lambda block: setattr(block.input_layernorm, "weight", mx.ones((1,))),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_arrays_that_do_not_fit_together_are_left_to_the_block_itself(misfit, compiled_calls):
    model = packed_model("qwen2", "affine", 4, 32)
    if misfit in ("fewer queries", "a cut factor"):
        adapt(model, LoRARule(rank=4))
    block = model.layers[0]
    MISFITS[misfit](block)
    compiled_calls.clear()
    try:
        expected = plain_step(block, 3)
    except (ValueError, TypeCheckError) as error:
        with pytest.raises(type(error)):
            step(block, 3)
    else:
        assert_close(step(block, 3), expected)
    assert not compiled_calls


def test_rows_of_another_width_are_left_to_the_block_itself(compiled_calls):
    block = packed_model("llama", "affine", 4, 32).layers[0]
    for width in (4, 72, 96):
        x, cache = mx.ones((1, 1, width)), filled_cache(block, 1)
        with pytest.raises(ValueError):
            mx.eval(next_position(block, x, cache))
    assert not compiled_calls


def test_replaced_weights_are_not_kept_in_memory():
    model = packed_model("llama", "affine", 4, 32, hidden_size=512)
    step(model.layers[0], 3)
    before = mx.get_active_memory()
    model.update(negated(model.parameters()))
    step(model.layers[0], 3)
    assert mx.get_active_memory() < 1.1 * before


def test_what_is_kept_does_not_hide_a_missing_array_or_other_bits():
    for change in (
        lambda layer: setattr(layer, "biases", None),
        lambda layer: setattr(layer, "bits", 8),
    ):
        block = packed_model("llama", "affine", 4, 32).layers[0]
        step(block, 3)
        change(block.mlp.up_proj)
        for compute in (plain_step, step):
            with pytest.raises((ValueError, TypeError)):
                compute(block, 3)
