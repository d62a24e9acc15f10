"""Accounting: what a model takes, measured; and what it will take, before it is there."""

import pytest

from tests.bases import BASES, arrays, packed
from tests.tiny import biased_model, qwen3_model
from textpolicy.adapters import AdapterConfig, AdapterContainer, memory_stats, quantize

CONFIG = AdapterConfig(rank=4, scale=2.0)


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_memory_is_the_sum_of_the_bytes_of_the_arrays(make):
    model = make()
    container = AdapterContainer.from_model(model, CONFIG)
    stats = memory_stats(model)
    total = sum(array.nbytes for array in arrays(model).values())
    assert stats["base_bytes"] + stats["adapter_bytes"] == total
    assert stats["adapter_bytes"] == sum(a.nbytes for a in container.parameters().values())
    assert stats["memory_ratio"] == stats["adapter_bytes"] / stats["base_bytes"]
    trainable = sum(array.size for array in container.parameters().values())
    assert stats["trainable_parameters"] == trainable
    assert stats["memory_savings_percent"] == 100 * (1 - trainable / stats["total_parameters"])


def test_packed_weights_count_as_the_weights_they_stand_for():
    plain, stored = memory_stats(qwen3_model()), memory_stats(packed(4)())
    assert stored["total_parameters"] == plain["total_parameters"]
    assert plain["bits_per_weight"] == 32
    # 4 bits, a float32 scale and bias for each 64 weights, and unpacked norms.
    assert 5 <= stored["bits_per_weight"] < 5.2


def test_a_biased_model_counts_its_biases_once_quantized():
    model = biased_model()
    before = memory_stats(model)["total_parameters"]
    quantize(model)
    assert memory_stats(model)["total_parameters"] == before
