"""memory_stats: the bytes of the arrays that are there."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from tests.bases import BASES, arrays, packed
from tests.tiny import TOKENS, biased_model, qwen3_model
from textpolicy.adapters import (
    AdapterConfig,
    AdapterContainer,
    memory_stats,
    print_trainable_parameters,
    quantize,
)

CONFIG = AdapterConfig(rank=4, scale=2.0)

# Bytes of a layer's scale, also of the gated one, and of the gate that all layers share.
SCALE, GATE = 4, 1


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_memory_is_the_sum_of_the_bytes_of_the_arrays(make):
    model = make()
    container = AdapterContainer.from_model(model, CONFIG)
    stats = memory_stats(model)
    total = sum(array.nbytes for array in arrays(model).values())
    assert stats["base_bytes"] + stats["adapter_bytes"] == total
    assert stats["adapter_bytes"] == sum(a.nbytes for a in container.parameters().values())
    assert stats["gradient_bytes"] == stats["adapter_bytes"] and stats["optimizer_bytes"] == 0
    # Two float32 scales for each layer, one of them gated, and a gate of one byte for all.
    assert stats["adapter_buffer_bytes"] == 2 * SCALE * len(container.layers()) + GATE
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


def test_the_optimizer_is_counted_once_it_has_a_state():
    model = qwen3_model()
    AdapterContainer.from_model(model, CONFIG)
    optimizer = optim.Adam(learning_rate=1e-3)
    gradient = nn.value_and_grad(model, lambda x: model(x).sum())(TOKENS)[1]
    optimizer.update(model, gradient)
    mx.eval(model.parameters(), optimizer.state)
    stats = memory_stats(model, optimizer)
    state = sum(array.nbytes for _, array in tree_flatten(optimizer.state))
    assert stats["optimizer_bytes"] == state
    # Two moments for each parameter, a step count and a learning rate.
    assert state == 2 * stats["adapter_bytes"] + 12
    assert stats["gradient_bytes"] == sum(array.nbytes for _, array in tree_flatten(gradient))


def test_doras_measured_lengths_are_counted():
    model = qwen3_model()
    container = AdapterContainer.from_model(model, AdapterConfig(kind="dora"))
    lengths = sum(layer.m.nbytes for layer in container.layers().values())
    buffers = memory_stats(model)["adapter_buffer_bytes"]
    assert buffers == lengths + 2 * SCALE * len(container.layers()) + GATE


def test_trainable_parameters_are_said_in_one_line():
    model = packed(3)()
    container = AdapterContainer.from_model(model, CONFIG)
    lines: list[str] = []
    print_trainable_parameters(model, lines.append)
    trained = sum(array.size for array in container.parameters().values())
    total = sum(array.size for array in arrays(qwen3_model()).values()) + trained
    assert lines == [
        f"trainable params: {trained:,} || all params: {total:,} || "
        f"trainable%: {100 * trained / total:.4f}"
    ]
