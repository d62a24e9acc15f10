"""Fewer bits for the base: every mode of mlx, NF4, the way back, and what cannot be."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.bases import arrays, packed, trained
from tests.devices import only_on_a_cpu
from tests.memory import peak_of
from tests.tiny import TOKENS, biased_model, expert_model, qwen3_model
from textpolicy.adapters import (
    AdapterConfig,
    AdapterContainer,
    NF4Embedding,
    NF4Linear,
    dequantize,
    quantize,
)
from textpolicy.adapters.quantization.nf4 import NF4_LEVELS, pack_nf4, unpack_nf4
from textpolicy.adapters.quantization.number_formats import NumberFormat
from textpolicy.adapters.quantization.packed_product import (
    CPUQuantizedLinear,
    CUDAQuantizedEmbedding,
    CUDAQuantizedLinear,
    use_fast_products,
)
from textpolicy.adapters.quantization.quantize import model_quantization
from textpolicy.adapters.quantization.stored_weights import float_weight, is_quantized
from textpolicy.errors import ConfigError, ModelError

CONFIG = AdapterConfig(rank=4, scale=2.0)
MODES = [(2, "affine"), (3, "affine"), (4, "affine"), (5, "affine"), (6, "affine"), (8, "affine")]
MODES += [(4, "mxfp4"), (8, "mxfp8"), (4, "nvfp4"), (4, "nf4")]
cpu = only_on_a_cpu("a GPU keeps mlx's products")


@pytest.mark.parametrize(
    ("bits", "group_size", "mode"),
    [(2, 32, "affine"), (3, 64, "affine"), (6, 64, "affine"), (4, 32, "mxfp4"), (4, 16, "nvfp4")],
)
def test_every_bit_width_takes_adapters_and_fuses_to_float(bits, group_size, mode):
    model = qwen3_model()
    quantize(model, bits, group_size, mode)
    before = model(TOKENS)
    container = AdapterContainer.from_model(model, CONFIG)
    assert mx.array_equal(before, model(TOKENS))
    container.swap(trained(container))
    adapted = model(TOKENS)
    container.fuse(dtype=mx.float32)
    assert float(mx.abs(model(TOKENS) - adapted).max()) < 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 1}, "larger than that of all weights set to zero"),
        ({"bits": 7}, "no kernels"),
        ({"bits": 9}, "bits is 9"),
        ({"group_size": 16}, "group_size is 16"),
        ({"mode": "nf5"}, "mode is 'nf5'"),
        ({"mode": "mxfp4", "group_size": 64}, r"group_size is 64; mode 'mxfp4' takes \[32\]"),
    ],
)
def test_a_quantization_that_cannot_be_is_refused_with_the_reason(options, words):
    model = qwen3_model()
    before = arrays(model)
    with pytest.raises(ConfigError, match=words):
        quantize(model, **options)
    assert all(array is before[name] for name, array in arrays(model).items())


def test_modules_that_do_not_divide_into_groups_are_reported():
    model = qwen3_model(intermediate_size=96)
    report = quantize(model)
    assert set(report.left_out) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert "96 do not divide into groups of 64" in report.left_out["model.layers.0.mlp.down_proj"]
    assert "lm_head" in report.quantized
    assert report.bytes_after < report.bytes_before / 3


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(ModelError, match="nothing to quantize"):
        quantize(qwen3_model(hidden_size=48, intermediate_size=96, head_dim=20))
    with pytest.raises(ModelError, match="quantized already"):
        quantize(packed(4)())


def test_quantizing_an_adapted_model_is_refused():
    model = qwen3_model()
    AdapterContainer.from_model(model, CONFIG)
    with pytest.raises(ModelError, match="Quantize the base before adapting"):
        quantize(model)


def test_a_predicate_chooses_what_is_quantized():
    model = qwen3_model()
    report = quantize(model, mode="nf4", predicate=lambda path, _: "mlp" in path)
    assert len(report.quantized) == 6 and not report.left_out
    assert not is_quantized(model.layers[0].self_attn.q_proj)
    quantize(model, 8, predicate=lambda path, _: path == "lm_head")
    assert model.lm_head.bits == 8
    assert model_quantization(model) is None


@pytest.mark.parametrize(("bits", "mode"), MODES)
def test_the_usual_group_size_is_the_modes_own(bits, mode):
    model = packed(bits, mode)()
    expected = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}.get(mode, 64)
    assert model_quantization(model) == {"bits": bits, "group_size": expected, "mode": mode}


# The way back


@pytest.mark.parametrize(("bits", "mode"), MODES)
def test_dequantized_weights_compute_what_the_packed_ones_did(bits, mode):
    model = packed(bits, mode, tied=True)()
    before = model(TOKENS)
    paths = dequantize(model, mx.float32)
    assert len(paths) == 15
    assert type(model.model.embed_tokens) is nn.Embedding
    assert not any(is_quantized(module) for module in model.modules())
    assert not model.trainable_parameters()["model"]["layers"][0]["mlp"]["up_proj"]
    # mlx looks rows of mxfp and nvfp4 tables up in bfloat16, which holds them exactly.
    assert float(mx.abs(model(TOKENS) - before).max()) < 2e-5


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_way_back_leads_to_the_dtype_of_before(dtype):
    model = biased_model()
    model.set_dtype(dtype)
    quantize(model, mode="nf4")
    dequantize(model)
    projection = model.layers[0].self_attn.q_proj
    assert projection.weight.dtype == dtype and projection.bias.dtype == dtype


def test_experts_come_back_too():
    model = expert_model()
    quantize(model)
    before = model(TOKENS)
    dequantize(model, predicate=lambda path, _: "switch_mlp" in path)
    assert float(mx.abs(model(TOKENS) - before).max()) < 1e-5


def test_dequantizing_what_is_not_quantized_or_is_adapted_is_refused():
    with pytest.raises(ModelError, match="nothing to dequantize"):
        dequantize(qwen3_model())
    model = packed(4)()
    AdapterContainer.from_model(model, CONFIG)
    with pytest.raises(ModelError, match="Fuse or unload the adapters first"):
        dequantize(model)


@pytest.mark.parametrize(("bits", "mode"), MODES)
def test_dora_reads_every_bit_width(bits, mode):
    model = packed(bits, mode)()
    before = model(TOKENS)
    config = AdapterConfig(kind="dora", rank=4, num_layers=1, keys=["mlp.down_proj"])
    container = AdapterContainer.from_model(model, config)
    assert mx.array_equal(model(TOKENS), before)
    (layer,) = container.layers().values()
    rows = np.linalg.norm(np.array(float_weight(layer.base)), axis=1)
    np.testing.assert_allclose(np.array(layer.m), rows, rtol=1e-5)


@pytest.mark.parametrize("mode", ["affine", "nf4"])
def test_a_bias_beside_a_packed_weight_is_frozen(mode):
    model = biased_model()
    quantize(model, mode=mode)
    assert "bias" in model.layers[0].self_attn.q_proj
    assert not tree_flatten(model.layers[0].self_attn.trainable_parameters())


def test_experts_with_a_scale_of_their_own_are_read_with_it():
    from mlx_lm.models.switch_layers import SwitchLinear

    experts = SwitchLinear(64, 32, 3, bias=False)
    experts.weight = experts.weight * mx.array([1.0, 20.0, 400.0])[:, None, None]
    packed = experts.to_quantized(group_size=16, mode="nvfp4", global_scale=True)
    assert packed.global_scale.shape == (3,)
    error = mx.linalg.norm(float_weight(packed) - experts.weight, axis=(1, 2))
    assert mx.all(error < 0.12 * mx.linalg.norm(experts.weight, axis=(1, 2)))


# NF4


def nearest_in_numpy(weight, group_size):
    """By the paper: the nearest level, relative to the largest magnitude of the group."""
    groups = weight.reshape(len(weight), -1, group_size).astype(np.float64)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    levels = np.array(NF4_LEVELS)
    codes = np.abs(groups[..., None] / largest[..., None] - levels).argmin(axis=-1)
    return (levels[codes] * largest).reshape(weight.shape), codes.reshape(weight.shape)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_nf4_is_the_nearest_level_of_the_group(group_size):
    weight = mx.random.normal((24, 256))
    codes, scales = pack_nf4(weight, group_size)
    size = 256 if group_size == -1 else group_size
    values, expected_codes = nearest_in_numpy(np.array(weight), size)
    assert codes.dtype == mx.uint8 and codes.shape == (24, 128)
    assert scales.shape == (24, 256 // size)
    # The first of two weights is in the upper half of their byte.
    assert np.array_equal(np.array(codes) >> 4, expected_codes[:, ::2])
    assert np.array_equal(np.array(codes) & 15, expected_codes[:, 1::2])
    np.testing.assert_allclose(np.array(unpack_nf4(codes, scales)), values, atol=1e-6)


def test_nf4_holds_zeros_extremes_and_its_own_values_exactly():
    weight = mx.concatenate([mx.array([NF4_LEVELS * 4]) * 3, mx.zeros((1, 64))])
    again = unpack_nf4(*pack_nf4(weight))
    assert mx.allclose(again, weight, atol=1e-6)
    assert not mx.any(again[1])
    assert mx.array_equal(unpack_nf4(*pack_nf4(again)), again)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_nf4_takes_4_bits_a_weight_and_one_scale_a_group(dtype):
    linear = nn.Linear(256, 64, bias=False)
    linear.set_dtype(dtype)
    packed = NF4Linear.from_linear(linear)
    assert packed.weight.nbytes == 256 * 64 / 2
    assert packed.scales.nbytes == 256 * 64 / 64 * dtype.size
    assert packed.scales.dtype == dtype
    assert not packed.trainable_parameters()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_gradient_through_nf4_is_that_of_its_float_weights(dtype):
    linear = nn.Linear(128, 48)
    layer = NF4Linear.from_linear(linear)
    x = mx.random.normal((2, 5, 128)).astype(dtype)
    target = mx.random.normal((2, 5, 48))

    def loss(x, weight=None):
        y = layer(x) if weight is None else x.astype(mx.float32) @ weight.T + linear.bias
        return mx.square(y.astype(mx.float32) - target).sum()

    given, expected = mx.grad(loss)(x), mx.grad(loss)(x, float_weight(layer))
    assert given.dtype == dtype
    tolerance = 1e-5 if dtype == mx.float32 else 2e-2
    assert float(mx.abs(given - expected).max()) < tolerance * float(mx.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["nf4", "affine"])
def test_float_weights_do_not_wait_for_the_backward_pass(mode):
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(100)))
    quantize(model, mode=mode)
    x = mx.random.normal((32, 512))

    def peak(multiply):
        def loss(x):
            for layer in model.layers:
                x = mx.tanh(multiply(layer, x))
            return x.sum()

        return peak_of(lambda: mx.eval(mx.value_and_grad(loss)(x)))

    mx.eval(model.parameters(), x)
    floats = 100 * 512 * 512 * 4
    assert peak(lambda layer, x: x @ float_weight(layer).T) > floats
    # mlx starts on some layers before it is done with others.
    assert peak(lambda layer, x: layer(x)) < 0.8 * floats


def test_a_model_in_nf4_is_saved_and_loaded(tmp_path):
    model = packed(4, "nf4", tied=True)()
    assert type(model.layers[0].mlp.up_proj) is NF4Linear
    assert type(model.model.embed_tokens) is NF4Embedding
    model.save_weights(str(tmp_path / "w.safetensors"))
    other = qwen3_model(seed=5, tie_word_embeddings=True)
    quantize(other, mode="nf4")
    other.load_weights(str(tmp_path / "w.safetensors"))
    assert mx.array_equal(model(TOKENS), other(TOKENS))


def test_nf4_of_whole_rows():
    model = qwen3_model()
    quantize(model, group_size=-1, mode="nf4")
    assert model.layers[0].mlp.down_proj.scales.shape == (64, 1)
    assert NumberFormat(mode="nf4", group_size=-1).row_problem(7) == (
        "rows of 7 do not pack into bytes of two weights"
    )


def test_experts_are_left_out_of_nf4_and_said_so():
    report = quantize(expert_model(), mode="nf4")
    reasons = {path: why for path, why in report.left_out.items() if "switch_mlp" in path}
    assert len(reasons) == 6
    assert all("nf4 is for linear and embedding layers" in why for why in reasons.values())


# How far from the float weights


@pytest.mark.parametrize(
    ("bits", "mode", "error"),
    [
        (2, "affine", 0.39),
        (3, "affine", 0.19),
        (4, "affine", 0.091),
        (8, "affine", 0.0054),
        (4, "mxfp4", 0.118),
        (8, "mxfp8", 0.027),
        (4, "nvfp4", 0.103),
        (4, "nf4", 0.092),
    ],
)
def test_each_format_keeps_normal_weights_as_well_as_it_should(bits, mode, error):
    linear = nn.Linear(512, 512, bias=False)
    linear.weight = mx.random.normal((512, 512)) * 0.02
    weight = linear.weight
    model = nn.Sequential(linear)
    quantize(model, bits, mode=mode)
    difference = float_weight(model.layers[0]) - weight
    found = float(mx.linalg.norm(difference) / mx.linalg.norm(weight))
    assert found == pytest.approx(error, rel=0.1)


# Products on GPUs


@pytest.fixture(params=[True, False], ids=["CUDA", "Metal"])
def has_cuda(request, monkeypatch):
    """Let `use_fast_products` see a GPU of either kind; the arrays stay on this device."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    monkeypatch.setattr(mx.cuda, "is_available", lambda: request.param)
    return request.param


def test_metal_keeps_the_layers_of_mlx(has_cuda):
    model = nn.Sequential(nn.QuantizedLinear(128, 64))
    use_fast_products(model)
    assert (type(model.layers[0]) is nn.QuantizedLinear) is not has_cuda


@pytest.mark.parametrize("has_cuda", [True], indirect=True)
@pytest.mark.parametrize(("bits", "mode"), MODES[:-1])
def test_cuda_multiplies_the_rows_of_a_decode_step_as_one_matrix(bits, mode, has_cuda, monkeypatch):
    linear = nn.QuantizedLinear.from_linear(nn.Linear(128, 64), bits=bits, mode=mode)
    table = nn.QuantizedEmbedding.from_embedding(nn.Embedding(64, 128), bits=bits, mode=mode)
    model = nn.Sequential(linear, table)
    use_fast_products(model)
    fast_linear, fast_table = model.layers
    assert type(fast_linear) is CUDAQuantizedLinear and type(fast_table) is CUDAQuantizedEmbedding
    assert fast_linear.weight is linear.weight and fast_linear.bias is linear.bias
    x, tokens = mx.random.normal((5, 1, 128)), mx.array([[3], [1]])
    expected = linear(x), table.as_linear(x), table(tokens)
    shapes: list[tuple[int, ...]] = []
    multiply = mx.quantized_matmul

    def recording(x, *arrays, **options):
        shapes.append(x.shape)
        return multiply(x, *arrays, **options)

    monkeypatch.setattr(mx, "quantized_matmul", recording)
    found = fast_linear(x), fast_table.as_linear(x), fast_table(tokens)
    assert shapes == [(5, 128)] * 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and mx.allclose(ours, theirs, atol=2e-5)


# Products on CPUs


@cpu
@pytest.mark.parametrize(("bits", "mode"), MODES[:-1])
@pytest.mark.parametrize("rows", [1, 40])
def test_both_products_give_the_same_numbers_and_gradients(bits, mode, rows):
    plain = nn.QuantizedLinear.from_linear(nn.Linear(128, 64), bits=bits, mode=mode)
    ours = nn.Sequential(plain)
    use_fast_products(ours)
    fast = ours.layers[0]
    assert type(fast) is CPUQuantizedLinear
    assert fast.weight is plain.weight and fast.bias is plain.bias
    x = mx.random.normal((rows, 128))
    assert mx.allclose(fast(x), plain(x), atol=2e-5)
    loss = lambda layer: lambda x: mx.square(layer(x)).sum()  # noqa: E731
    assert mx.allclose(mx.grad(loss(fast))(x), mx.grad(loss(plain))(x), atol=1e-4)


@cpu
def test_a_loaded_model_that_is_quantized_multiplies_fast(tmp_path, load_tiny):
    from mlx_lm.utils import save_model

    model, _ = load_tiny()
    before = model(TOKENS)
    use_fast_products(model)
    assert mx.array_equal(model(TOKENS), before)
    quantize(model)
    kinds = {type(module).__name__ for module in model.modules() if is_quantized(module)}
    assert kinds == {"CPUQuantizedLinear", "CPUQuantizedEmbedding"}
    save_model(tmp_path, model)
    names = mx.load(str(tmp_path / "model.safetensors")).keys()
    assert "model.layers.0.mlp.up_proj.scales" in names
