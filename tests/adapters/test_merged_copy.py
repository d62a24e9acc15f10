"""A copy with merged weights computes what the adapted model does, and shares all else with it."""

import gc

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.bases import BASES, arrays, trained
from tests.memory import peak_of
from tests.tiny import TOKENS, biased_model, expert_model, qwen3_model
from textpolicy.adapters import AdapterConfig, AdapterContainer, LoRARule
from textpolicy.adapters.adapter_state import AdapterState
from textpolicy.adapters.layers.adapter_layer import adapter_layers
from textpolicy.adapters.merged_copy import MergedCopy
from textpolicy.errors import ConfigError
from textpolicy.fast_cpu import bfloat16_copies
from textpolicy.fast_cpu.bfloat16_copies import keep_copies

EVERYWHERE = r".*(proj|embed_tokens|lm_head)"
CASES = {
    "lora": (qwen3_model, {}),
    "dora": (qwen3_model, {"kind": "dora"}),
    "a tied head": (lambda: qwen3_model(tie_word_embeddings=True), {}),
    "a tied head with dora": (lambda: qwen3_model(tie_word_embeddings=True), {"kind": "dora"}),
    "biased layers": (biased_model, {}),
    "a trained bias": (biased_model, {"bias": True, "module_path": r".*_proj"}),
    "a trained bias of layers without one": (
        qwen3_model,
        {"bias": True, "module_path": r".*_proj", "kind": "dora"},
    ),
    "experts": (expert_model, {}),
    "dropout": (qwen3_model, {"dropout": 0.5}),
}


def adapt(make, *, module_path=EVERYWHERE, **words):
    model = make()
    rule = LoRARule(module_path=module_path, rank=4, **words)
    container = AdapterContainer.from_model(model, AdapterConfig(rules=[rule]))
    model.eval()
    return model, container


def difference(one, other):
    return float(mx.abs(one - other).max())


@pytest.mark.parametrize("case", CASES)
def test_each_version_is_merged_and_the_model_stays_as_it_was(case):
    make, words = CASES[case]
    model, container = adapt(make, **words)
    merged = MergedCopy(model)
    assert mx.array_equal(merged.refresh()(TOKENS), model(TOKENS))
    for version in range(1, 4):
        container.swap(trained(container, seed=version), version=version)
        expected, before = model(TOKENS), arrays(model)
        copy = merged.refresh()
        found = copy(TOKENS)
        assert difference(found, expected) < 1e-5 * float(mx.abs(expected).max())
        assert not adapter_layers(copy) and not copy.trainable_parameters().get("lm_head")
        after = arrays(model)
        assert before.keys() == after.keys()
        assert all(before[name] is after[name] for name in before)
        own = {id(array) for array in arrays(copy).values()} - {id(a) for a in after.values()}
        weights = [layer.base["weight"].size for layer in container.layers().values()]
        biased = "bias" in words
        assert len(own) == len(weights) * (2 if biased else 1)
        assert merged.refresh() is copy and copy(TOKENS).tolist() == found.tolist()


def test_fresh_adapters_and_adapters_that_are_turned_off_take_no_memory():
    model, container = adapt(qwen3_model)
    base = {id(array) for array in arrays(model).values()}
    merged = MergedCopy(model)
    assert {id(array) for array in arrays(merged.refresh()).values()} <= base
    before = model(TOKENS)
    container.swap(trained(container))
    assert difference(merged.refresh()(TOKENS), before) > 0.01
    with container.disabled():
        assert mx.array_equal(merged.refresh()(TOKENS), before)
    assert difference(merged.refresh()(TOKENS), model(TOKENS)) < 1e-4


def test_adapters_of_other_modules_and_none_are_followed():
    model = qwen3_model()
    merged = MergedCopy(model)
    assert merged.refresh() is model
    for path in (r".*q_proj", r".*(up_proj|embed_tokens)"):
        rule = LoRARule(module_path=path, rank=4)
        container = AdapterContainer.from_model(model, AdapterConfig(rules=[rule]))
        container.swap(trained(container))
        copy = merged.refresh()
        assert difference(copy(TOKENS), model(TOKENS)) < 1e-4
        container.unload()
        assert merged.refresh() is model


def test_the_state_of_the_copy_is_that_of_the_merged_adapters():
    model, container = adapt(qwen3_model)
    merged = MergedCopy(model)
    container.swap(trained(container, seed=1))
    first = AdapterState.of(merged.refresh())
    assert first == AdapterState.of(model)
    container.swap(trained(container, seed=2), version=container.version)
    assert AdapterState.of(merged.refresh()) != first


@pytest.mark.parametrize("base", [name for name in BASES if name != "float32"])
def test_weights_that_are_not_float32_are_refused(base):
    model, _ = adapt(BASES[base])
    with pytest.raises(ConfigError, match=r"16 of 16 adapted weights are not float32: the weight"):
        MergedCopy(model)


def test_a_base_that_is_quantized_where_no_adapter_is_can_be_merged():
    model = qwen3_model()
    nn.quantize(model, class_predicate=lambda path, _: path.endswith("up_proj"))
    rule = LoRARule(module_path=r".*q_proj", rank=4)
    container = AdapterContainer.from_model(model, AdapterConfig(rules=[rule]))
    container.swap(trained(container))
    assert difference(MergedCopy(model).refresh()(TOKENS), model(TOKENS)) < 1e-4


def test_the_old_merged_weights_are_freed_before_new_ones_are_made(monkeypatch):
    monkeypatch.setattr(bfloat16_copies, "FEWEST_NUMBERS", 1)
    model, container = adapt(lambda: qwen3_model(hidden_size=256, intermediate_size=512))
    merged = MergedCopy(model)
    sizes = [layer.base["weight"].nbytes for layer in container.layers().values()]
    gc.collect()
    mx.clear_cache()
    before, peaks = mx.get_active_memory(), list[int]()
    for version in range(3):
        container.swap(trained(container, seed=version))
        # An engine asks for copies of the weights, which must not keep old weights in memory.
        peaks.append(peak_of(lambda: keep_copies(merged.refresh(), 1 << 40), before))
    assert min(peaks) >= sum(sizes)
    # The first merge has no old weights to keep. A GPU may free memory late, which adds to a peak.
    assert min(peaks[1:]) < peaks[0] + max(sizes)
    if mx.default_device().type == mx.cpu:
        # On CUDA, a product also has a workspace, which is larger than these weights.
        assert max(peaks) < sum(sizes) + 2.5 * max(sizes)
