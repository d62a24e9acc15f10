"""Blocks that compute a decode step by one operation give the numbers of their own code."""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import QuantizedKVCache

from tests.fast_cpu.arrays import assert_close
from tests.generation.test_generation import row_of
from tests.tiny import SIZES, biased_model, qwen3_model, randomized
from textpolicy import fast_cpu
from textpolicy.adapters import AdapterConfig, AdapterContainer, quantize
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.layers.adapter_layer import adapter_layers
from textpolicy.fast_cpu import decoder_block
from textpolicy.fast_cpu.gradients import without_gradients
from textpolicy.fast_cpu.model_functions import use_fast_functions
from textpolicy.fast_cpu.rotary import FastRoPE, one_step
from textpolicy.fast_cpu.weight_values import keep_weight_values
from textpolicy.generation.decoding_batch import DecodingCache
from textpolicy.generation.engine import Engine
from textpolicy.types import Sampling

pytestmark = pytest.mark.usefixtures("compiled_operations")

COUNTED = decoder_block

STEP = ["block"]
PROMPTS = [[5, 17, 3, 44, 60, 2], [9], [1, 2, 3], [7] * 40]


def llama_model(**changes) -> nn.Module:
    args = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": True} | SIZES
    return randomized(llama.Model(llama.ModelArgs(**args | changes)), 0)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": llama_model,
    "llama with biases": lambda: llama_model(attention_bias=True, mlp_bias=True),
    "llama3": lambda: llama_model(rope_scaling=LLAMA3),
    "llama with many heads": lambda: llama_model(num_attention_heads=8, num_key_value_heads=8),
    "llama with other widths": lambda: llama_model(hidden_size=72, intermediate_size=50),
    "qwen2": biased_model,
    "qwen3": qwen3_model,
}
ADAPTERS = {
    "no adapters": None,
    "rank 1": LoRARule(rank=1),
    "rank 4": LoRARule(rank=4),
    "rank 20": LoRARule(rank=20),
    "some layers": LoRARule(rank=4, module_path=".*(q_proj|v_proj|down_proj)"),
    "dora": LoRARule(rank=4, kind="dora"),
}


def model_of(kind: str, adapters: str = "no adapters", **changes: Any) -> nn.Module:
    model = MODELS[kind](**changes)
    use_fast_functions(model)
    if rule := ADAPTERS[adapters]:
        adapt(model, rule)
    return model.eval()


def adapt(model: nn.Module, rule: LoRARule) -> AdapterContainer:
    container = AdapterContainer.from_model(model, AdapterConfig(rules=[rule]))
    container.swap({name: array + 0.02 for name, array in container.parameters().items()})
    return container


@contextmanager
def plain_blocks() -> Generator[None]:
    """Let blocks compute their steps by their own code, whatever has been kept of them."""
    with pytest.MonkeyPatch.context() as patch, keep_weight_values({}):
        patch.setattr(decoder_block.CompiledLinear, "of", lambda layer: None)
        yield


def next_position(
    block: nn.Module, x: mx.array, cache: DecodingCache, mask: mx.array | None = None
) -> mx.array:
    """Return what a block gives for a position of each row, as in a step of decoding."""
    with one_step([cache.offset]), without_gradients():
        return block(x, mask, cache)


def next_logits(model: nn.Module, tokens: mx.array, caches: list[Any]) -> mx.array:
    with one_step([one for layer in caches if isinstance(one := layer.offset, mx.array)]):
        return model(tokens, cache=caches)


def decoded(model: nn.Module, steps: int = 4, *, rows: int = 3, cache=None) -> np.ndarray:
    """Return the logits of some steps after a prompt."""
    caches = [cache() if cache else DecodingCache([0] * rows) for _ in model.layers]
    tokens = mx.random.randint(0, 96, (rows, 7 + steps), key=mx.random.key(1))
    logits: list[mx.array] = []
    with without_gradients():
        model(tokens[:, :7], cache=caches)
        for at in range(7, 7 + steps):
            logits.append(next_logits(model, tokens[:, at : at + 1], caches))
    return np.array(mx.concatenate(logits, axis=1).astype(mx.float32))


@pytest.mark.parametrize(("rows", "threads"), [(1, 1), (3, 2), (60, 2)])
@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("kind", MODELS)
def test_steps_give_the_logits_of_plain_blocks(
    kind, adapters, rows, threads, compiled_calls, threads_restored
):
    model = model_of(kind, adapters)
    fast_cpu.set_threads(threads)
    found = decoded(model, rows=rows)
    # Two layers and four steps.
    assert compiled_calls == STEP * 8
    with plain_blocks():
        expected = decoded(model, rows=rows)
    assert len(compiled_calls) == 8
    assert_close(found, expected)


def by_engine(model: nn.Module, tokens: int = 30) -> list[tuple[list[int], list[float]]]:
    rows = [
        row_of(
            prompt,
            member=number,
            stop=lambda _: None,
            sampling=Sampling(max_tokens=tokens + number),
        )
        for number, prompt in enumerate(PROMPTS)
    ]
    engine = Engine(model)
    for row in rows:
        engine.submit([row])
    while engine.can_step:
        engine.step()
    return [(row.tokens, row.logprobs) for row in rows]


@pytest.mark.parametrize("adapters", ["no adapters", "rank 4"])
@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen2", "qwen3"])
def test_rows_with_prompts_of_other_lengths_are_decoded_as_by_plain_blocks(
    kind, adapters, compiled_calls
):
    model = model_of(kind, adapters)
    found = by_engine(model)
    assert set(compiled_calls) == {*STEP}
    assert len(compiled_calls) >= 2 * 29
    with plain_blocks():
        expected = by_engine(model)
    for (tokens, logprobs), (right, others) in zip(found, expected, strict=True):
        assert tokens == right
        np.testing.assert_allclose(logprobs, others, atol=2e-4)


@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen2", "qwen3"])
def test_left_padding_is_hidden_from_each_row(kind, compiled_calls):
    model = model_of(kind, "rank 4")

    def logits(paddings: list[int], tokens: mx.array) -> list[mx.array]:
        caches = [DecodingCache(paddings) for _ in model.layers]
        results: list[mx.array] = []
        with without_gradients():
            model(tokens[:, :9], cache=caches)
            for at in range(9, 12):
                results.append(next_logits(model, tokens[:, at : at + 1], caches))
        return results

    tokens = mx.random.randint(0, 96, (3, 12), key=mx.random.key(2))
    found = logits([4, 0, 8], tokens)
    assert compiled_calls == STEP * 6
    with plain_blocks():
        expected = logits([4, 0, 8], tokens)
    for one, right in zip(found, expected, strict=True):
        assert_close(np.array(one), np.array(right))
    # What stands under the padding changes nothing.
    other = mx.where(mx.arange(12) < mx.array([4, 0, 8])[:, None], 1, tokens)
    for one, same in zip(found, logits([4, 0, 8], other), strict=True):
        np.testing.assert_allclose(np.array(one), np.array(same), atol=1e-5)


def test_a_change_of_an_adapter_is_in_the_next_step(compiled_calls):
    model = model_of("qwen3")
    base = decoded(model)
    container = adapt(model, LoRARule(rank=4))
    changed = decoded(model)
    assert np.abs(changed - base).max() > 1e-2
    for layer in container.layers().values():
        layer.set_enabled(mx.array(False))
    np.testing.assert_array_equal(decoded(model), base)
    assert compiled_calls == STEP * 24


@pytest.mark.parametrize(
    "view",
    [
        lambda w: mx.contiguous(w.T).T,
        lambda w: mx.concatenate([w, w], axis=-1)[:, : w.shape[1]],
        lambda w: mx.contiguous(w[::-1])[::-1],
        lambda w: mx.broadcast_to(w[:1], w.shape),
        lambda w: mx.broadcast_to(w[:, :1], w.shape),
    ],
    ids=["transposed", "with gaps", "backwards", "one row", "one column"],
)
@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b"])
def test_weights_are_read_as_they_are_stored(view, name, compiled_calls):
    model = model_of("qwen2", "rank 4")
    for layer in adapter_layers(model).values():
        owner = layer.base if name == "weight" else layer
        owner[name] = view(owner[name])
    found = decoded(model, rows=20)
    assert compiled_calls == STEP * 8
    with plain_blocks():
        assert_close(found, decoded(model, rows=20))


def test_a_mask_that_is_added_is_not_taken_for_one_of_yes_and_no():
    block = model_of("llama").layers[0]
    prompt, x = (mx.random.normal((2, n, 64), key=mx.random.key(n)) for n in (4, 1))

    def result() -> np.ndarray:
        cache, mask = DecodingCache([0, 0]), mx.array([0.0, -1e9, 0, 0, 0])[None, None, None]
        with without_gradients():
            block(prompt, "causal", cache)
        return np.array(next_position(block, x, cache, mask))

    found = result()
    with plain_blocks():
        assert_close(found, result())


def test_positions_outside_a_step_are_computed_by_the_block_itself(compiled_calls):
    """The block takes the angles of the step, which know each layer's array of positions."""
    model, results = model_of("qwen3"), []
    for positions in (lambda layer: [], lambda layer: [mx.array(layer.offset)]):
        cache = DecodingCache([0, 0])
        for at in range(3):
            x = mx.random.normal((2, 1, 64), key=mx.random.key(at))
            with one_step(positions(cache)), without_gradients():
                results.append(np.array(model.layers[0](x, None, cache)))
    assert not compiled_calls
    cache = DecodingCache([0, 0])
    for at in range(3):
        x = mx.random.normal((2, 1, 64), key=mx.random.key(at))
        found = np.array(next_position(model.layers[0], x, cache))
        for right in (results[at], results[3 + at]):
            assert_close(found, right)
    assert compiled_calls == STEP * 3


def test_prompts_and_passes_with_gradients_are_computed_by_the_block_itself(compiled_calls):
    model = model_of("llama")
    caches = [DecodingCache([0]) for _ in model.layers]
    with without_gradients():
        model(mx.array([[1, 2, 3]]), cache=caches)
        model(mx.array([[1]]))
    next_logits(model, mx.array([[4]]), caches)
    assert not compiled_calls


class Swapped(nn.Linear):
    """A layer of another class."""

    def __call__(self, x):
        return -super().__call__(x)


class OtherNorm(nn.RMSNorm):
    def __call__(self, x):
        return 2 * super().__call__(x)


class OtherEmbedding(FastRoPE):
    def __call__(self, x, *args, **options):
        return 2 * super().__call__(x, *args, **options)


class OtherMLP(llama.MLP):
    def __call__(self, x):
        return 2 * super().__call__(x)


CHANGES = {
    "quantized by mlx alone": lambda model: nn.quantize(model, group_size=32, bits=4),
    "quantized in 6 bits": lambda model: quantize(model, bits=6, group_size=32),
    "bfloat16": lambda model: model.set_dtype(mx.bfloat16),
    "one layer in bfloat16": lambda model: model.layers[0].mlp.set_dtype(mx.bfloat16),
    "a norm in bfloat16": lambda model: model.layers[0].input_layernorm.set_dtype(mx.bfloat16),
    "another layer": lambda model: setattr(model.layers[0].mlp.up_proj, "__class__", Swapped),
    "another norm": lambda model: setattr(
        model.layers[0].post_attention_layernorm, "__class__", OtherNorm
    ),
    "another part": lambda model: setattr(model.layers[0].mlp, "__class__", OtherMLP),
    "another embedding": lambda model: setattr(
        model.layers[0].self_attn.rope, "__class__", OtherEmbedding
    ),
    "a trained bias": lambda model: AdapterContainer.from_model(
        model, AdapterConfig(rules=[LoRARule(rank=4, bias=True)])
    ),
    "dora with a trained bias": lambda model: AdapterContainer.from_model(
        model, AdapterConfig(rules=[LoRARule(rank=4, kind="dora", bias=True)])
    ),
    "dropout in training": lambda model: AdapterContainer.from_model(
        model, AdapterConfig(rank=4, scale=2.0, dropout=0.5)
    ),
}


OF_ONE_BLOCK = [
    *("another layer", "another norm", "another part", "another embedding"),
    *("one layer in bfloat16", "a norm in bfloat16"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_of_another_kind_is_computed_by_its_own_code(change, compiled_calls):
    model = model_of("llama")
    CHANGES[change](model)
    model.train(change == "dropout in training")
    mx.random.seed(1)
    found, asked = decoded(model), compiled_calls.copy()
    mx.random.seed(1)
    with plain_blocks():
        expected = decoded(model)
    # Some changes leave the second of the two blocks as it is.
    assert asked == (STEP * 4 if change in OF_ONE_BLOCK else [])
    assert_close(found, expected)


def of_attention(change: Callable[[Any], object]) -> Callable[[nn.Module], None]:
    """Return a function that changes the attention of every block."""

    def change_all(model: nn.Module) -> None:
        for block in model.layers:
            change(block.self_attn)

    return change_all


def without_bias(attention: nn.Module) -> None:
    del attention.q_proj["bias"]


def exchanged(attention: nn.Module) -> None:
    k, v = attention.k_proj, attention.v_proj
    attention.k_proj, attention.v_proj = v, k


def of_other_heads(attention: nn.Module) -> None:
    attention.n_heads, attention.n_kv_heads = 4, 2
    attention.rope.dims = 16


OPTIONS: dict[str, Callable[[nn.Module], object]] = {
    "another scale": of_attention(lambda one: setattr(one, "scale", 0.5)),
    "more heads": of_attention(of_other_heads),
    "another base of angles": of_attention(lambda one: setattr(one.rope, "base", 500.0)),
    "other angles": of_attention(lambda one: setattr(one, "rope", nn.RoPE(32, base=99.0))),
    "neighbours turned in pairs": of_attention(lambda one: setattr(one.rope, "traditional", True)),
    "no bias": of_attention(without_bias),
    "another bias": of_attention(lambda one: setattr(one.k_proj, "bias", mx.ones(32) / 3)),
    "keys for values": of_attention(exchanged),
    "another epsilon": lambda model: setattr(model.layers[1].input_layernorm, "eps", 0.1),
    "another norm's weight": lambda model: setattr(
        model.layers[0].post_attention_layernorm, "weight", mx.ones(64) / 3
    ),
    "another norm of the class": lambda model: setattr(
        model.layers[0], "input_layernorm", OtherNorm(64)
    ),
    "a layer of another class": lambda model: setattr(
        model.layers[0].self_attn.o_proj, "__class__", Swapped
    ),
    "the blocks exchanged": lambda model: model.layers.reverse(),
}


@pytest.mark.parametrize(
    ("change", "adapter"),
    [
        *((change, None) for change in OPTIONS | CHANGES),
        *((change, kind) for change in OPTIONS for kind in ("lora", "dora")),
    ],
)
def test_the_next_step_takes_a_change_while_values_are_kept(change, adapter):
    model = model_of("llama with biases")
    if adapter:
        adapt(model, LoRARule(rank=4, kind=adapter, module_path=".*(gate_proj|down_proj)"))
    with keep_weight_values({}):
        before = decoded(model)
        (OPTIONS | CHANGES)[change](model)
        model.train(change == "dropout in training")
        mx.random.seed(1)
        found = decoded(model)
    mx.random.seed(1)
    with plain_blocks():
        assert_close(found, decoded(model))
    assert change in CHANGES or np.abs(found - before).max() > 1e-3


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_next_step_takes_each_change_of_an_adapter_while_values_are_kept(kind):
    model = model_of("qwen3")
    base = decoded(model)

    def check(change: Callable[[], object]) -> None:
        before = decoded(model)
        change()
        found = decoded(model)
        with plain_blocks():
            assert_close(found, decoded(model))
        assert np.abs(found - before).max() > 1e-3

    with keep_weight_values({}):
        container = adapt(model, LoRARule(rank=4, kind=kind))
        arrays = container.parameters()
        container.add("other", container.adapter())
        check(lambda: container.swap({name: 2 * array for name, array in arrays.items()}))
        check(lambda: container.activate("other"))
        layer = next(iter(container.layers().values()))
        check(lambda: layer.set_scale(9.0))
        check(lambda: layer.set_enabled(mx.array(False)))
        check(lambda: layer.set_enabled(mx.array(True)))
        with container.disabled():
            np.testing.assert_array_equal(decoded(model), base)
        check(container.unload)
        np.testing.assert_array_equal(decoded(model), base)
        check(lambda: container.load(model))


def test_blocks_that_come_and_go_are_never_taken_for_each_other():
    """A new block may get the memory of one that is gone, and its id."""
    with keep_weight_values({}):
        for number in range(12):
            model = model_of(("llama", "qwen3", "qwen2")[number % 3])
            model.layers[1].mlp.up_proj.weight *= number
            found = decoded(model, steps=1)
            with plain_blocks():
                assert_close(found, decoded(model, steps=1))
            del model


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 2},
        {"hidden_size": 66, "num_attention_heads": 2, "num_key_value_heads": 1},
    ],
    ids=["heads that cannot share", "a head of an odd width"],
)
def test_sizes_that_the_block_itself_refuses_are_refused(sizes, compiled_calls):
    model = model_of("llama", **sizes)
    cache = DecodingCache([0])
    with pytest.raises(ValueError):
        mx.eval(next_position(model.layers[0], mx.ones((1, 1, sizes["hidden_size"])), cache))
    assert not compiled_calls


def test_a_quantized_cache_is_left_to_the_block_itself(compiled_calls):
    model = model_of("llama", "rank 4")
    found = decoded(model, cache=lambda: QuantizedKVCache(group_size=32, bits=8))
    assert not compiled_calls
    np.testing.assert_allclose(found, decoded(model), atol=0.1)
    assert compiled_calls == STEP * 8


def test_a_longer_cache_is_read_where_it_lies(compiled_calls):
    """A cache grows by 256 positions, and has unused ones at its end."""
    model = model_of("qwen3", "rank 4")
    found = decoded(model, steps=260, rows=1)
    assert compiled_calls == STEP * 520
    with plain_blocks():
        assert_close(found, decoded(model, steps=260, rows=1))


def test_what_a_row_gives_does_not_depend_on_the_rows_beside_it():
    model = model_of("qwen3", "rank 4")

    def logits(rows: slice) -> np.ndarray:
        tokens = mx.random.randint(0, 96, (8, 10), key=mx.random.key(1))[rows]
        caches = [DecodingCache([0] * len(tokens)) for _ in model.layers]
        with without_gradients():
            for at in range(10):
                last = next_logits(model, tokens[:, at : at + 1], caches)
        return np.array(last)

    together = logits(slice(None))
    for row in (0, 5, 7):
        assert_close(logits(slice(row, row + 1)), together[row : row + 1])


def test_several_threads_decode_at_the_same_time(compiled_calls):
    models = [model_of("llama", "rank 4"), model_of("qwen3")]
    expected = [decoded(model, steps=20) for model in models]
    wrong: list[float] = []

    def decode(number: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            for _ in range(3):
                found = decoded(models[number % 2], steps=20)
                wrong.append(float(np.abs(found - expected[number % 2]).max()))

    threads = [threading.Thread(target=decode, args=(n,), daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [0.0] * 12
