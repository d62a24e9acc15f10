"""Batches of any ragged rows: each counted token is there once, with its own numbers."""

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import chain, count
from random import Random

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.logprobs import token_logprobs
from tests.strategies import examples
from tests.test_types import rollout
from textpolicy.algorithms import dr_grpo, get
from textpolicy.device_sizes import device_sizes
from textpolicy.training.advantages import add_advantages, advantages_by_group
from textpolicy.training.batch import (
    BatchTotals,
    TrainingRow,
    count_padded_tokens,
    make_batch,
    split_into_micro_batches,
    split_into_mini_batches,
    training_rows,
)
from textpolicy.training.logprobs import ModelLogprobs, add_logprobs
from textpolicy.training.output_head import find_output_head
from textpolicy.types import Batch, Rollout, RolloutGroup, Sampling, StopReason, Task

SIZES = st.none() | st.integers(1, 7)
PROMPTS = st.lists(st.integers(1, 250), min_size=1, max_size=6)
# The first sampled token is counted; tool output and other replies are not.
MASKS = st.lists(st.booleans(), max_size=7).map(lambda rest: [True, *rest])


@st.composite
def groups(draw: st.DrawFn, masks=MASKS, most_groups=5, most_members=4) -> list[RolloutGroup]:
    """Groups of rollouts; some groups share a prompt. The number of a token is its name."""
    prompts = draw(st.lists(PROMPTS, min_size=1, max_size=3))
    names = count(1000)

    def member(prompt: list[int]) -> Rollout:
        mask = draw(masks)
        own = [next(names) for _ in mask]
        return rollout(
            tokens=[*prompt, *own],
            mask=[False] * len(prompt) + mask,
            # Computed, because hypothesis gives up on examples of thousands of draws.
            logprobs=[0.0] * len(prompt)
            + [-(name % 97) / 13 * on for name, on in zip(own, mask, strict=True)],
            reward=draw(st.none() | st.floats(-5, 5)),
            stop_reason=draw(st.sampled_from(StopReason)),
            sampling=Sampling(
                max_tokens=draw(st.integers(1, 99)), temperature=draw(st.sampled_from([0.5, 1.0]))
            ),
        )

    found = []
    for g in range(draw(st.integers(1, most_groups))):
        prompt = draw(st.sampled_from(prompts))
        members = [member(prompt) for _ in range(draw(st.integers(1, most_members)))]
        found.append(RolloutGroup(task=Task(id=str(g), prompt="p"), rollouts=members))
    return found


@st.composite
def rows_of(draw: st.DrawFn, drawn_groups=groups()) -> list[TrainingRow]:  # noqa: B008
    """At least one row, with advantages and with all, or none, of the computed numbers."""
    rows = training_rows(draw(drawn_groups), exclude_truncated=draw(st.booleans()))
    if not rows:
        rows = training_rows([RolloutGroup(task=Task(id="t", prompt="p"), rollouts=[rollout()])])
    computed = [name for name in ("logp_fresh", "entropies", "logp_ref") if draw(st.booleans())]
    random = np.random.default_rng(draw(st.integers(0, 99)))
    return [
        replace(
            row,
            advantage=draw(st.sampled_from([0.0, 0.0, -1.5, 0.25, 3.0])),
            **{name: random.normal(size=len(row.mask)).astype(np.float32) for name in computed},
        )
        for row in rows
    ]


def identity(row: TrainingRow) -> tuple[int, int]:
    return row.group, row.member


def assert_row(batch: Batch, r: int, row: TrainingRow) -> None:
    """Assert that row `r` of the batch is this row, and padding behind it."""
    owner = batch.owner[r].item()
    width = int(batch.prompt_lengths[owner].item())
    prompt, end = batch.prompts[owner].tolist(), len(row.tokens)
    assert tuple(prompt[:width]) == row.prompt and not any(prompt[width:])
    assert batch.group[r].item() == row.group
    assert batch.temperature[r].item() == np.float32(row.rollout.sampling.temperature)
    advantages = [row.advantage if counted else 0.0 for counted in row.mask]
    expected = {
        "tokens": row.tokens,
        "mask": row.mask,
        "logp_sampled": row.logp_sampled,
        "logp_old": row.logp_sampled if row.logp_fresh is None else row.logp_fresh,
        "advantages": advantages,
    } | ({} if row.logp_ref is None else {"logp_ref": row.logp_ref})
    for name, values in expected.items():
        found = np.array(getattr(batch, name)[r])
        assert np.array_equal(found[:end], values), name
        assert not found[end:].any(), f"padding of {name}"


@given(rows_of(), SIZES, st.booleans())
def test_every_token_is_in_one_micro_batch_with_its_own_numbers(rows, size, share):
    totals = BatchTotals.of(rows)
    parts = split_into_micro_batches(rows, size, share_prompts=share)
    batches = [make_batch(part, totals) for part in parts]
    for part, batch in zip(parts, batches, strict=True):
        assert len(part) == len(batch.tokens)
        assert len(batch.prompts) == len({row.prompt for row in part})
        for r, row in enumerate(part):
            assert_row(batch, r, row)
        assert (batch.rows, batch.token_count) == (len(rows), totals.token_count)
    placed = Counter(
        token
        for batch in batches
        for token in np.array(batch.tokens)[np.array(batch.mask)].tolist()
    )
    counted = [token for row in rows for token, on in zip(row.tokens, row.mask, strict=True) if on]
    assert placed == Counter(counted)
    assert totals.token_count == max(1, len(counted))
    assert totals.max_tokens == max(row.rollout.sampling.max_tokens for row in rows)
    if totals.entropies is not None:
        assert len(totals.entropies) == len(counted)


# Long enough that groups are cut, and that few groups fit into one part.
LONG = st.sampled_from([1, 2, 30, 150, 400, 700]).map(lambda length: [True] * length)


@given(rows_of(groups(LONG, most_members=6)), SIZES, st.booleans())
def test_micro_batches_hold_each_row_once_and_are_no_larger_than_asked(rows, size, share):
    parts = split_into_micro_batches(rows, size, share_prompts=share)
    assert sorted(identity(row) for part in parts for row in part) == sorted(map(identity, rows))
    signal = {row.group for row in rows if row.has_signal}
    with_signal = [{row.group in signal for row in part} for part in parts]
    assert with_signal == sorted(with_signal, reverse=True, key=lambda one: one == {True})
    assert all(len(one) == 1 for one in with_signal)
    if size is not None:
        assert all(0 < len(part) <= size for part in parts)
        return
    whole = Counter(row.group for row in rows)
    for part in parts:
        tokens = count_padded_tokens(part, share_prompts=share)
        in_part = Counter(row.group for row in part)
        if len(in_part) > 1:
            assert tokens <= device_sizes().micro_batch_tokens
        for group in in_part:
            longest = max(len(row.tokens) for row in rows if row.group == group)
            longest += 0 if share else next(r.prompt_length for r in rows if r.group == group)
            if in_part[group] < whole[group]:
                assert whole[group] * longest > device_sizes().micro_batch_tokens


@given(rows_of(), st.integers(1, 6), st.integers(0, 99))
def test_mini_batches_never_separate_a_group_and_keep_the_order_of_rows(rows, parts, seed):
    dealt = split_into_mini_batches(rows, parts, Random(seed))
    assert len(dealt) == min(parts, len({row.group for row in rows}))
    order = {identity(row): place for place, row in enumerate(rows)}
    places = [[order[identity(row)] for row in part] for part in dealt]
    assert all(part and part == sorted(part) for part in places)
    assert sorted(chain.from_iterable(places)) == list(range(len(rows)))
    owners = [{row.group for row in part} for part in dealt]
    assert sum(map(len, owners)) == len(set().union(*owners))
    # As even as whole groups allow.
    assert max(map(len, owners)) - min(map(len, owners)) <= 1


@given(groups(), st.randoms(use_true_random=False), st.booleans())
def test_advantages_come_back_in_the_order_of_groups_and_members(drawn, random, exclude):
    rows = training_rows(drawn, exclude_truncated=exclude)
    if not rows:
        return
    size = max(2, *(len(group.rollouts) for group in drawn))
    rows = add_advantages(rows, dr_grpo.compute_advantages, frozenset(), 0.0, group_size=size)
    random.shuffle(rows)
    table = advantages_by_group(drawn, rows)
    assert [len(line) for line in table] == [len(group.rollouts) for group in drawn]
    for group, line in zip(drawn, table, strict=True):
        rewards = [r.reward for r in group.rollouts if r.reward is not None]
        for one, advantage in zip(group.rollouts, line, strict=True):
            left_out = exclude and one.stop_reason is StopReason.LENGTH
            if one.reward is None or left_out:
                assert advantage is None
            else:
                assert advantage == pytest.approx(one.reward - np.mean(rewards), abs=1e-5)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "luspo"])
@given(rows=rows_of(groups(most_groups=3)), size=SIZES)
@examples(0.3)
def test_losses_of_micro_batches_add_up_to_the_loss_of_the_batch(name, rows, size):
    totals = BatchTotals.of(rows)
    loss_of = partial(_loss, get(name).policy_loss, totals)
    whole = loss_of(rows)
    parts = sum(loss_of(part) for part in split_into_micro_batches(rows, size))
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-5)


def _loss(policy_loss, totals: BatchTotals, rows: list[TrainingRow]) -> float:
    batch = make_batch(rows, totals)
    # A token's own number decides how its log-probability differs from the old one.
    change = mx.sin(batch.tokens.astype(mx.float32)) * 0.3
    return float(policy_loss(batch.logp_old + change, batch)[0])


@pytest.fixture(scope="module")
def model(load_tiny):
    return load_tiny()[0]


@given(drawn=groups(most_groups=3, most_members=3), size=SIZES, share=st.booleans())
@examples(0.4)
def test_batched_logprobs_are_those_of_each_row_alone(model, drawn, size, share):
    rows = training_rows(drawn)
    # The embedded model has 256 tokens or more.
    small = [
        replace(row, segment=replace(row.segment, tokens=[t % 251 for t in row.segment.tokens]))
        for row in rows
    ]
    policy = ModelLogprobs(model, find_output_head(model), share)
    done = add_logprobs(small, policy=policy, micro_batch_size=size)
    assert sorted(map(identity, done)) == sorted(map(identity, rows))
    for row in done:
        temperature = mx.array([row.rollout.sampling.temperature])
        alone = token_logprobs(model, mx.array([row.segment.tokens]), temperature)
        for found, expected in zip((row.logp_fresh, row.entropies), alone, strict=True):
            own = np.where(row.rollout.mask, np.array(expected[0]), 0)[row.prompt_length :]
            assert np.allclose(found, own, rtol=1e-4, atol=1e-4)
