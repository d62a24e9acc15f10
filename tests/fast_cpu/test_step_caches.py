"""A block adds keys and values to its cache where they lie, and nobody else sees it."""

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from tests.fast_cpu.arrays import assert_close, normal
from tests.fast_cpu.test_decoder_block import (
    STEP,
    llama_model,
    model_of,
    next_logits,
    next_position,
    plain_blocks,
)
from tests.generation.test_generation import row_of
from textpolicy import fast_cpu
from textpolicy.fast_cpu import decoder_block
from textpolicy.fast_cpu.gradients import without_gradients
from textpolicy.fast_cpu.model_functions import use_fast_functions
from textpolicy.fast_cpu.weight_values import keep_weight_values
from textpolicy.generation.decode_step import launch_step
from textpolicy.generation.decoding_batch import DecodingCache, DecodingRow
from textpolicy.generation.engine import Engine
from textpolicy.generation.prefill import prefill_prompts
from textpolicy.types import Sampling

pytestmark = pytest.mark.usefixtures("compiled_operations")

COUNTED = decoder_block
HIDDEN, WIDTH, PLACES = 64, 32, 256


def block_of(**changes: int) -> Any:
    """Return a block, by default with two heads that share one of the cache."""
    model = llama_model(num_hidden_layers=1, **changes)
    use_fast_functions(model)
    return model.eval().layers[0]


def cache_of(
    past: int, paddings: Sequence[int], *, heads: int = 1, widths: tuple[int, int] = (WIDTH, WIDTH)
) -> DecodingCache:
    """Return a cache with so many positions, padding included."""
    cache = DecodingCache([*paddings])
    shapes = ((len(paddings), heads, past, width) for width in widths)
    cache.update_and_fetch(*(normal(*shape, seed=n) for n, shape in enumerate(shapes)))
    mx.eval(cache.keys, cache.values)
    return cache


def step(block: nn.Module, cache: DecodingCache, number: int = 0) -> mx.array:
    """Return what a block gives for a position of each row, and for a mask if rows are padded."""
    x = normal(len(cache.offset), 1, HIDDEN, seed=10 + number)
    return next_position(block, x, cache, cache.make_mask(1))


def steps(block: nn.Module, cache: DecodingCache, count: int) -> np.ndarray:
    return np.stack([np.array(step(block, cache, number)) for number in range(count)])


def used(cache: DecodingCache) -> np.ndarray:
    """Return the keys and values that are used, padding included."""
    return np.stack([np.array(one[..., : cache.used, :]) for one in (cache.keys, cache.values)])


def address(array: mx.array) -> int:
    return np.array(array, copy=False).__array_interface__["data"][0]


def evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array


HOLDERS: dict[str, Callable[[DecodingCache], Any]] = {
    "the array": lambda cache: cache.keys,
    "the state": lambda cache: cache.state[0],
    "a copy of the array": lambda cache: copy.copy(cache.keys),
    "a view of numpy": lambda cache: np.array(cache.keys, copy=False),
    "a view of memory": lambda cache: memoryview(cache.keys),
    "another library": lambda cache: np.from_dlpack(cache.keys),
    "a slice": lambda cache: evaluated(cache.keys[:, :, 3:20]),
    "a row": lambda cache: evaluated(cache.keys[1:]),
    "a slice that is read later": lambda cache: cache.keys[:, :, 3:20],
    "a sum that is read later": lambda cache: cache.keys.sum(axis=-1),
    "another shape": lambda cache: evaluated(cache.keys.reshape(-1)),
    "other numbers of the bits": lambda cache: evaluated(cache.keys.view(mx.int32)),
    "the same without a gradient": lambda cache: evaluated(mx.stop_gradient(cache.keys)),
    "a deep copy": lambda cache: copy.deepcopy(cache).keys,
    "the text of a row": lambda cache: cache.extract(1).keys,
}


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("holder", HOLDERS)
def test_what_somebody_else_holds_keeps_its_numbers(holder, rows, compiled_calls):
    """The place of the next position is held too, with the zero that it has before the step."""
    block, cache = block_of(), cache_of(9, [0] * rows)
    right = HOLDERS[holder](cache_of(9, [0] * rows))
    held = HOLDERS[holder](cache)
    found = steps(block, cache, 3)
    np.testing.assert_array_equal(np.array(held), np.array(right))
    assert compiled_calls == STEP * 3
    with plain_blocks():
        assert_close(found, steps(block, other := cache_of(9, [0] * rows), 3))
    assert_close(used(cache), used(other))


def test_a_copy_of_a_cache_goes_its_own_way():
    block, cache = block_of(), cache_of(9, [0, 2, 0])
    step(block, cache)
    copies = [copy.deepcopy(cache), copy.copy(cache), cache]
    for number, one in enumerate(copies):
        one.offset = mx.array(one.offset)
        mx.eval(step(block, one, number), one.keys)
    for number, one in enumerate(copies):
        other = cache_of(9, [0, 2, 0])
        step(block, other), step(block, other, number)
        np.testing.assert_array_equal(used(one), used(other))


@pytest.mark.parametrize("rows", [1, 32])
def test_a_step_changes_the_cache_where_it_lies(rows):
    block, cache = block_of(num_key_value_heads=2), cache_of(9, [0] * rows, heads=2)
    before = address(cache.keys), address(cache.values)
    mx.reset_peak_memory()
    memory = mx.get_active_memory()
    for number in range(20):
        mx.eval(step(block, cache, number), cache.keys, cache.values)
        assert (address(cache.keys), address(cache.values)) == before
    assert rows == 1 or mx.get_peak_memory() - memory < cache.nbytes / 4


def test_a_view_of_a_cache_is_copied_once():
    block, cache = block_of(num_key_value_heads=2), cache_of(40, [9, 7, 8, 0] * 8, heads=2)
    cache.filter(mx.array([0, 1, 2] * 8))
    # The first seven positions are cut off.
    mx.eval(step(block, cache), cache.keys)
    before = address(cache.keys)
    mx.reset_peak_memory()
    memory = mx.get_active_memory()
    for number in range(5):
        mx.eval(step(block, cache, number), cache.keys)
    assert address(cache.keys) == before
    assert mx.get_peak_memory() - memory < cache.nbytes / 4


HEADS = 2


def keep(*rows: int) -> Callable[[DecodingCache], None]:
    """Return a function that keeps these rows; a number may be larger than the last row's."""
    return lambda cache: cache.filter(mx.array([row % len(cache.offset) for row in rows]))


def extend(past: int, paddings: Sequence[int]) -> Callable[[DecodingCache], None]:
    return lambda cache: cache.extend(cache_of(past, paddings, heads=HEADS))


def come_to_empty_rows(cache: DecodingCache) -> None:
    empty = DecodingCache([0, 0])
    empty.extend(cache)
    cache.state = empty.state


def cut(cache: DecodingCache) -> None:
    cache.keys, cache.values = cache.keys_and_values()


CHANGES: dict[str, Callable[[DecodingCache], object]] = {
    "a row goes": keep(2, 0),
    "rows are put in another order": keep(2, 0, 1),
    "a padded row remains": keep(1),
    "a row is repeated": keep(1, 1, 0, 1),
    "longer rows come": extend(20, [0, 5]),
    "shorter rows come": extend(4, [0, 3]),
    "empty rows come": lambda cache: cache.extend(DecodingCache([0, 0])),
    "it comes to empty rows": come_to_empty_rows,
    "a position is taken back": lambda cache: cache.trim(1),
    "several positions are taken back": lambda cache: cache.trim(4),
    "its unused places go": cut,
}


@pytest.mark.parametrize("second", CHANGES)
@pytest.mark.parametrize("first", CHANGES)
def test_steps_follow_any_change_of_the_rows(first, second, compiled_calls):
    block = block_of(num_key_value_heads=HEADS)

    def results() -> list[np.ndarray]:
        cache = cache_of(9, [0, 3, 1], heads=HEADS)
        found = [steps(block, cache, 2)]
        for change in (first, second):
            CHANGES[change](cache)
            found.append(steps(block, cache, 2))
        return [*found, used(cache), np.array(cache.offset), np.array(cache.left_padding)]

    ours = results()
    assert {*compiled_calls} == {*STEP} and len(compiled_calls) >= 4
    with plain_blocks():
        right = results()
    for one, other in zip(ours, right, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_view_of_one_row_and_head_lies_in_a_larger_array(rows):
    """Such a view has its numbers side by side, so it is changed where it lies."""
    block, whole = block_of(), cache_of(30, [9, 0, 4])
    whole.filter(mx.array([0]))
    assert whole.used == 21
    found = steps(block, whole, 2)
    alone = cache_of(30, [9, 0, 4])
    alone.filter(mx.array([0]))
    with plain_blocks():
        assert_close(found, steps(block, alone, 2))


@pytest.mark.parametrize("past", [254, 255, 256, 257, 300, 511, 512])
@pytest.mark.parametrize("paddings", [[0], [0, 7, 3]])
def test_a_full_cache_grows(past, paddings, compiled_calls):
    block, cache, other = block_of(), *(cache_of(past, paddings) for _ in range(2))
    found = steps(block, cache, 4)
    assert compiled_calls == STEP * 4
    with plain_blocks():
        assert_close(found, steps(block, other, 4))
    assert_close(used(cache), used(other))
    np.testing.assert_array_equal(cache.offset, other.offset)


def test_a_cache_without_any_unused_position_grows():
    """The cache of a repeated prompt has room for no more tokens than its rows may get."""
    block, cache, other = block_of(), *(cache_of(9, [0, 0]) for _ in range(2))
    cut(cache)
    found = steps(block, cache, 3)
    np.testing.assert_array_equal(found, steps(block, other, 3))
    assert cache.keys.shape[2] == 9 + PLACES


def test_an_empty_cache_gets_its_first_position(compiled_calls):
    block, cache, other = block_of(num_key_value_heads=2), *(DecodingCache([0] * 3) for _ in "ab")
    found = steps(block, cache, 3)
    assert compiled_calls == STEP * 3
    assert cache.keys.shape == (3, 2, PLACES, WIDTH)
    with plain_blocks():
        assert_close(found, steps(block, other, 3))
    assert_close(used(cache), used(other))


def test_a_refused_position_leaves_the_cache_as_it_was():
    block = block_of()
    for make in (lambda: DecodingCache([0, 0]), lambda: cache_of(9, [0, 0])):
        cache, other = make(), make()
        with pytest.raises(ValueError):
            next_position(block, mx.ones((2, 1, 96)), cache)
        assert cache.used == other.used
        np.testing.assert_array_equal(steps(block, cache, 2), steps(block, other, 2))


# What is not used.


@pytest.mark.parametrize("paddings", [[0, 0, 0], [4, 0, 8], [2, 5, 3]])
def test_unused_places_change_no_bit(paddings, compiled_calls):
    block, clean, cache = block_of(), *(cache_of(9, paddings) for _ in range(2))
    places = mx.arange(PLACES)[None, :]
    unused = (places >= 9) | (places < mx.array(paddings)[:, None])
    cache.keys, cache.values = (
        mx.where(unused[:, None, :, None], mx.nan, one) for one in (cache.keys, cache.values)
    )
    np.testing.assert_array_equal(steps(block, cache, 3), steps(block, clean, 3))
    assert compiled_calls == STEP * 6


def test_numbers_of_a_row_stay_in_the_row():
    block, clean, cache = block_of(), *(cache_of(9, [0, 0, 0]) for _ in range(2))
    cache.keys[1, 0, 4, 5] = mx.nan
    found, right = steps(block, cache, 2), steps(block, clean, 2)
    np.testing.assert_array_equal(found[:, [0, 2]], right[:, [0, 2]])
    assert np.isnan(found[:, 1]).all()


SEEN = 10
SHOWN = mx.random.bernoulli(0.6, (3, 1, 1, SEEN), key=mx.random.key(4))
MASKS: dict[str, tuple[mx.array, bool]] = {
    "one for each row": (SHOWN, True),
    "one for all rows": (SHOWN[:1], True),
    "one repeated": (mx.broadcast_to(SHOWN[1:2], SHOWN.shape), True),
    "one in another order": (mx.contiguous(SHOWN.swapaxes(0, 3)).swapaxes(0, 3), True),
    "part of a longer one": (mx.concatenate([SHOWN, SHOWN], axis=-1)[..., :SEEN], True),
    "backwards": (SHOWN[::-1, ..., ::-1], True),
    "nothing is shown": (mx.zeros((3, 1, 1, SEEN), mx.bool_), True),
    "all or nothing": (mx.broadcast_to(SHOWN[..., :1], SHOWN.shape), True),
    "one for each head": (mx.broadcast_to(SHOWN, (3, 2, 1, SEEN)), False),
    "without an axis": (SHOWN[0], False),
    "one axis": (SHOWN[0, 0, 0], False),
    "one number": (mx.array([[[[True]]]]), False),
    "added": (mx.where(SHOWN, 0.0, -1e9), False),
    "added in half precision": (mx.where(SHOWN, 0.0, -1e9).astype(mx.bfloat16), False),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_hide_the_same_keys_as_in_the_block_itself(mask, compiled_calls):
    array, is_taken = MASKS[mask]
    block, cache, other = block_of(), *(cache_of(SEEN - 1, [0] * 3) for _ in range(2))
    x = normal(3, 1, HIDDEN, seed=3)
    found = np.array(next_position(block, x, cache, array))
    assert compiled_calls == (STEP if is_taken else [])
    with plain_blocks():
        assert_close(found, np.array(next_position(block, x, other, array)))
    assert_close(used(cache), used(other))


# The graph of several steps.


def by_steps(is_lazy: bool, *, count: int = 6, paddings: Sequence[int] = (0, 0, 0)) -> list[Any]:
    """Return the logits and caches of steps in which each reads the tokens of the one before."""
    model = model_of("qwen3", "rank 4")
    caches, tokens = [DecodingCache([*paddings]) for _ in model.layers], mx.array([[5], [9], [7]])
    results: list[mx.array] = []
    with without_gradients(), keep_weight_values({}):
        model(mx.array([[1, 2, 3, 4]] * 3), cache=caches)
        for _ in range(count):
            results.append(next_logits(model, tokens, caches))
            tokens = mx.argmax(results[-1], axis=-1)
            if not is_lazy:
                mx.eval(results, [layer.state for layer in caches])
    return [*results, *(used(layer) for layer in caches)]


@pytest.mark.parametrize("paddings", [[0, 0, 0], [2, 0, 1]])
def test_steps_may_wait_for_each_other(paddings):
    found, right = (by_steps(is_lazy, paddings=paddings) for is_lazy in (True, False))
    for one, other in zip(found, right, strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))


@pytest.mark.parametrize("is_read_first", [True, False])
def test_a_cache_is_read_as_it_was_between_two_steps_of_one_graph(is_read_first):
    block, cache, other = block_of(), *(cache_of(9, [0, 0]) for _ in range(2))
    mx.eval(step(block, other), other.keys)
    expected = np.array(other.keys).sum(axis=-1)
    between = [step(block, cache), cache.keys.sum(axis=-1)]
    after = step(block, cache, 1)
    mx.eval([*between, after] if is_read_first else [after, *between[::-1]])
    np.testing.assert_allclose(np.array(between[1]), expected, atol=1e-5)
    np.testing.assert_array_equal(np.array(after), np.array(step(block, other, 1)))


def test_a_step_that_nobody_evaluates_changes_nothing():
    block, cache = block_of(), cache_of(9, [0, 0])
    state, before = cache.state, used(cache)
    step(block, cache)
    cache.state = state
    np.testing.assert_array_equal(used(cache), before)
    np.testing.assert_array_equal(steps(block, cache, 2), steps(block, cache_of(9, [0, 0]), 2))


def test_steps_follow_each_other_on_several_streams():
    block, cache, other = block_of(), *(cache_of(9, [0] * 8) for _ in range(2))
    streams = [mx.new_stream(mx.cpu) for _ in range(3)]
    found: list[mx.array] = []
    for number in range(30):
        with mx.stream(streams[number % 3]):
            found.append(step(block, cache, number))
            mx.async_eval(found[-1], cache.keys, cache.values)
    np.testing.assert_array_equal(np.array(mx.stack(found)), steps(block, other, 30))


def test_threads_that_share_the_beginning_of_a_cache_do_not_disturb_each_other():
    block, cache = block_of(), cache_of(9, [0, 0, 2])
    expected = steps(block, copy.deepcopy(cache), 20)
    wrong: list[bool] = []

    def repeat() -> None:
        with mx.stream(mx.new_stream(mx.cpu)), keep_weight_values({}):
            for _ in range(3):
                wrong.append(not np.array_equal(steps(block, copy.deepcopy(cache), 20), expected))

    threads = [threading.Thread(target=repeat, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [False] * 12


# Widths, heads, rows and threads.

SHAPES = {
    "one row": (1, 2, 1, 32, 32),
    "heads of their own": (3, 4, 4, 16, 16),
    "four heads share one": (3, 4, 1, 16, 16),
    "six heads share two": (2, 6, 2, 10, 10),
    "wider values": (3, 4, 2, 16, 24),
    "narrower values": (3, 4, 2, 16, 6),
    "one value": (2, 2, 1, 32, 1),
    "two numbers a key": (2, 8, 2, 2, 2),
    "many rows": (70, 4, 2, 16, 20),
}


@pytest.mark.parametrize("past", [1, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_other_shapes_give_the_numbers_of_their_own_code(
    shape, past, threads, compiled_calls
):
    rows, heads, key_heads, width, value_width = SHAPES[shape]
    block = block_of(num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=width)
    block.self_attn.v_proj = nn.Linear(HIDDEN, key_heads * value_width, bias=False)
    block.self_attn.o_proj = nn.Linear(heads * value_width, HIDDEN, bias=False)
    paddings = [0, *[past // 2] * (rows - 1)]
    caches = [cache_of(past, paddings, heads=key_heads, widths=(width, value_width)) for _ in "ab"]
    found = steps(block, caches[0], 3)
    assert compiled_calls == STEP * 3
    with plain_blocks():
        assert_close(found, steps(block, caches[1], 3))
    for one, other in zip(caches[0].keys_and_values(), caches[1].keys_and_values(), strict=True):
        assert_close(one, np.array(other))


def test_a_row_has_the_same_bits_with_any_threads(threads_restored):
    block, results = block_of(num_key_value_heads=2), []
    for count in (1, 2):
        fast_cpu.set_threads(count)
        results.append(steps(block, cache_of(200, [0, 20, 9] * 9, heads=2), 3))
    np.testing.assert_array_equal(*results)


# Engines.

LENGTHS = {
    "one token each": [[5], [9], [7]],
    "one token, and longer": [[5], [1, 2, 3], [7] * 40],
    "longer, and one token": [[7] * 40, [1, 2, 3], [5]],
    "one and two tokens": [[5], [9, 3], [7]],
    "two and one token": [[9, 3], [5], [7, 1]],
}


def new_row(number: int, prompt: list[int], tokens: int) -> DecodingRow:
    sampling = Sampling(max_tokens=tokens)
    return row_of(prompt, member=number, stop=lambda _: None, sampling=sampling)


def by_engine(
    model: nn.Module, prompts: list[list[int]], *, waiting: int = 0, ahead: bool = False
) -> list[tuple[list[int], list[float]]]:
    """Decode rows, of which each comes so many steps after the one before."""
    rows = [new_row(number, prompt, 9 + 2 * number) for number, prompt in enumerate(prompts)]
    engine, left, taken = Engine(model, launch_ahead=ahead), [*rows], 0
    while left or engine.can_step:
        while left and taken >= waiting * (len(rows) - len(left)):
            engine.submit([left.pop(0)])
        engine.step()
        taken += 1
    return [(row.tokens, row.logprobs) for row in rows]


@pytest.mark.parametrize("waiting", [0, 3])
@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("prompts", LENGTHS)
def test_rows_with_short_prompts_decode_as_they_do_alone(prompts, ahead, waiting, compiled_calls):
    model = model_of("llama", "rank 4")
    found = by_engine(model, LENGTHS[prompts], waiting=waiting, ahead=ahead)
    assert {*compiled_calls} == {*STEP}
    with plain_blocks():
        plain = by_engine(model, LENGTHS[prompts], waiting=waiting)
    for number, prompt in enumerate(LENGTHS[prompts]):
        engine, row = Engine(model), new_row(number, prompt, 9 + 2 * number)
        engine.submit([row])
        while engine.can_step:
            engine.step()
        for tokens, logprobs in (found[number], plain[number]):
            assert tokens == row.tokens
            np.testing.assert_allclose(logprobs, row.logprobs, atol=2e-4)


@pytest.mark.parametrize("waiting", [0, 3])
def test_a_step_that_starts_ahead_changes_no_bit(waiting):
    model, prompts = model_of("qwen3", "rank 4"), [[5], [1, 2, 3], [9], [7] * 40]
    ahead, not_ahead = (
        by_engine(model, prompts, waiting=waiting, ahead=ahead) for ahead in (True, False)
    )
    assert ahead == not_ahead


def test_copied_rows_of_a_batch_decode_beside_it():
    """A batch has a step that is not read yet: its position is not in the copy."""
    model = model_of("llama", "rank 4")

    def new_batch() -> Any:
        return prefill_prompts(model, [[new_row(n, [3, 4, 5], 9)] for n in range(3)])

    def take(batch: Any, count: int) -> list[Any]:
        return [np.array(launch_step(model, batch).logprobs) for _ in range(count)]

    batch, alone = new_batch(), new_batch()
    right = take(alone, 5)
    assert np.array_equal(take(batch, 2), right[:2])
    copied = batch.copy_rows([2, 0])
    before = [used(layer) for layer in copied.cache]
    assert np.array_equal(take(batch, 3), right[2:])
    for layer, numbers in zip(copied.cache, before, strict=True):
        np.testing.assert_array_equal(used(layer), numbers)
    for logprobs, expected in zip(take(copied, 3), right[2:], strict=True):
        np.testing.assert_allclose(logprobs, expected[[2, 0]], atol=1e-5)
