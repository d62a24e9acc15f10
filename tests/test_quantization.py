"""Fewer bits for the base: every mode of mlx, NF4, the way back, and what cannot be."""

import mlx.core as mx
import pytest

from tests.bases import arrays, packed, trained
from tests.tiny import TOKENS, qwen3_model
from textpolicy.adapters import AdapterConfig, AdapterContainer, quantize
from textpolicy.errors import ConfigError, ModelError

CONFIG = AdapterConfig(rank=4, scale=2.0)


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
        ({"mode": "mxfp4", "group_size": 64}, r"group_size is 64; mode 'mxfp4' has \[32\]"),
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
    with pytest.raises(ModelError, match="quantize its base before adapting"):
        quantize(model)
