"""What a trainer can be asked for beyond one update: references, several updates, masks."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import count
from random import Random

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from tests.training.test_trainer import TASKS, TIMES, length_reward, setup, weights
from textpolicy import algorithms
from textpolicy.adapters import AdapterContainer
from textpolicy.algorithms import (
    cispo,
    distillation,
    dpo,
    gdpo,
    grpo,
    gspo,
    reinforce,
    rloo,
)
from textpolicy.errors import ConfigError, TrainingError
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.rollout.worker import collect
from textpolicy.training.batch import (
    BatchTotals,
    make_batch,
    split_into_micro_batches,
    split_into_mini_batches,
    training_rows,
)
from textpolicy.training.logprobs import ModelLogprobs, add_logprobs
from textpolicy.training.metrics import sum_micro_batches
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer
from textpolicy.types import NOT_SAMPLED, RolloutGroup, StopReason


def moves(model, before) -> float:
    after = weights(model)
    return math.sqrt(sum(float(((after[n] - before[n]) ** 2).sum()) for n in before))


def ever_higher():
    """A reward by which every group teaches: no two are equal."""
    numbers = count()
    return lambda prompt, completion, example: float(next(numbers))


def recording(loss_fn, seen: list):
    def loss(logp, batch):
        seen.append(batch)
        return loss_fn(logp, batch)

    return loss


def test_mini_batches_share_out_whole_groups_and_each_is_an_update(load_tiny):
    seen = []
    _, trainer, groups = setup(
        load_tiny,
        reward=ever_higher(),
        mini_batches=2,
        loss_fn=recording(grpo.policy_loss, seen),
        optimizer=optim.SGD(learning_rate=5.0),
    )
    metrics = trainer.train(groups)
    assert [batch.rows for batch in seen] == [6, 6]
    assert [len(set(batch.group.tolist())) for batch in seen] == [2, 2]
    assert set(seen[0].group.tolist()).isdisjoint(seen[1].group.tolist())
    assert trainer.version == 1
    assert metrics["entropy"] != trainer.train(groups)["entropy"]
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-4, "that of the first update"


@pytest.mark.parametrize(
    ("loss", "share"),
    [
        (partial(grpo.policy_loss, clip_low=1e-3, clip_high=1e-3), "clip_ratio/region_mean"),
        (partial(gspo.policy_loss, clip_low=1e-3, clip_high=1e-3), "clip_ratio/region_mean"),
        (partial(cispo.policy_loss, cap=1.001), "cispo_clip_ratio"),
    ],
)
def test_micro_batches_of_one_token_change_no_share(load_tiny, loss, share):
    results = []
    for size in (None, 1):
        model, trainer, groups = setup(load_tiny, micro_batch_size=size, loss_fn=loss, epochs=2)
        short = create_policy(model, load_tiny()[1], {"max_tokens": 1})
        groups[:2] = collect(TASKS[:2], short, ever_higher(), group_size=3, seed=0)
        results.append(trainer.train(groups))
    whole, one_by_one = results
    assert whole[share] > 0
    for name in whole.keys() - TIMES:
        assert one_by_one[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-5), name


def test_mini_batches_are_dealt_by_the_seed(load_tiny):
    _, _, groups = setup(load_tiny)
    rows = training_rows(groups)

    def dealt(seed):
        parts = split_into_mini_batches(rows, 2, Random(seed))
        return [sorted({row.group for row in part}) for part in parts]

    assert dealt(3) == dealt(3)
    assert len({str(dealt(seed)) for seed in range(8)}) > 1
    assert sorted(group for part in dealt(5) for group in part) == [0, 1, 2, 3]


def test_epochs_go_through_the_batch_again(load_tiny):
    model, trainer, groups = setup(load_tiny, epochs=3, optimizer=optim.SGD(learning_rate=0.1))
    once_model, once, same = setup(load_tiny, optimizer=optim.SGD(learning_rate=0.1))
    before = weights(model)
    trainer.train(groups)
    once.train(same)
    assert moves(model, before) > 1.5 * moves(once_model, before)


def test_fresh_old_log_probabilities_are_the_trainer_s_own(load_tiny):
    seen = []
    _, trainer, groups = setup(
        load_tiny,
        reward=ever_higher(),
        old_logprobs="fresh",
        loss_fn=recording(grpo.policy_loss, seen),
    )
    drifted = [
        replace(
            g,
            rollouts=[
                replace(r, logprobs=[x - 0.05 * m for x, m in zip(r.logprobs, r.mask, strict=True)])
                for r in g.rollouts
            ],
        )
        for g in groups
    ]
    metrics = trainer.train(drifted)
    (batch,) = seen
    off = mx.where(batch.mask, batch.logp_old - batch.logp_sampled, 0).sum() / batch.token_count
    assert off.item() == pytest.approx(0.05, abs=1e-4)
    assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.05, abs=1e-4)


def test_choosing_uncertain_tokens_does_not_depend_on_micro_batches(load_tiny):
    results = []
    for size in (None, 1):
        loss = algorithms.get("dapo", weights=["top_entropy_tokens(fraction=0.3)"]).policy_loss
        model, trainer, groups = setup(
            load_tiny, loss_fn=loss, old_logprobs="fresh", micro_batch_size=size
        )
        trainer.train(groups)
        results.append(weights(model))
    for name, value in results[0].items():
        assert np.abs(results[1][name] - value).max() < 1e-6, name


def fresh_trainer(load_tiny, **options):
    """A trainer of adapters that have not moved yet, and rollouts of it."""
    model, trainer, _ = setup(load_tiny, **options)
    container = AdapterContainer.of(model)
    still = {
        n: v if n.endswith("lora_a") else mx.zeros_like(v)
        for n, v in container.parameters().items()
    }
    container.swap(still, version=0)
    _, tokenizer = load_tiny()
    policy = create_policy(model, tokenizer, {"max_tokens": 10})
    return model, trainer, collect(TASKS, policy, length_reward, group_size=3, seed=0)


def test_the_divergence_from_the_base_is_zero_at_step_zero_and_grows(load_tiny):
    loss = algorithms.get("grpo", beta=0.1).policy_loss
    _, trainer, groups = fresh_trainer(load_tiny, loss_fn=loss, reference="base")
    assert trainer.train(groups)["kl"] == pytest.approx(0, abs=1e-7)
    off_policy = trainer.train(groups)
    assert off_policy["kl"] > 1e-5


def test_the_reference_is_the_model_without_its_adapters(load_tiny):
    seen = []
    _, trainer, groups = setup(
        load_tiny,
        reward=ever_higher(),
        reference="base",
        loss_fn=recording(grpo.policy_loss, seen),
    )
    trainer.train(groups)
    base, _ = load_tiny()
    rows = training_rows(groups)
    (part,) = split_into_micro_batches(rows, None)
    (batch,) = seen
    expected, _ = ModelLogprobs.of(base)(make_batch(part, BatchTotals.of(rows)))
    assert mx.allclose(batch.logp_ref, expected, atol=1e-5)
    with pytest.raises(ConfigError, match=r"reference is 'base'.*has none"):
        Trainer(base, grpo.compute_advantages, grpo.policy_loss, optim.SGD(1.0), reference="base")


def test_a_pull_to_the_base_alone_brings_adapters_back(load_tiny):
    loss = algorithms.get("grpo", beta=1.0).policy_loss
    _, trainer, groups = setup(
        load_tiny,
        loss_fn=loss,
        reference="base",
        reward=lambda prompt, completion, example: 1.0,
        optimizer=optim.SGD(learning_rate=0.5),
    )
    found = [trainer.train(groups)["kl"] for _ in range(4)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.9 * found[0]


def test_a_divergence_can_be_taken_off_the_reward(load_tiny):
    _, trainer, groups = setup(
        load_tiny, reference="base", reward_kl=0.5, advantage_fn=rloo.compute_advantages
    )
    rows = training_rows(groups)
    with trainer.adapters.disabled():
        known = add_logprobs(rows, reference=trainer._logprobs)
    metrics = trainer.train(groups)
    shaped = np.zeros((4, 3), np.float32)
    for row in known:
        counted = np.array(row.rollout.mask[row.prompt_length :])
        cost = (row.logp_old - row.logp_ref)[counted].sum()
        shaped[row.group, row.member] = row.rollout.reward - 0.5 * cost
    expected = np.array(rloo.compute_advantages(mx.array(shaped)))
    assert metrics["advantages/max"] == pytest.approx(float(expected.max()), abs=1e-5)
    plain = np.array(
        rloo.compute_advantages(mx.array([[r.reward for r in g.rollouts] for g in groups]))
    )
    assert abs(float(plain.max()) - metrics["advantages/max"]) > 1e-3


def test_a_divergence_from_nothing_is_refused(load_tiny):
    with pytest.raises(ConfigError, match=r"reward_kl is 0\.1, and there is no reference"):
        setup(load_tiny, reward_kl=0.1)


def cut_off(groups, which) -> list[RolloutGroup]:
    """The groups as if members of these numbers had reached the length limit."""
    return [
        replace(
            group,
            rollouts=[
                replace(r, stop_reason=StopReason.LENGTH) if m in which else r
                for m, r in enumerate(group.rollouts)
            ],
        )
        for group in groups
    ]


def test_completions_that_were_cut_off_can_be_left_out_of_the_loss(load_tiny):
    seen = []
    _, trainer, groups = setup(
        load_tiny,
        reward=ever_higher(),
        truncated="mask",
        loss_fn=recording(grpo.policy_loss, seen),
    )
    trainer.train(cut_off(groups, {1}))
    (batch,) = seen
    whole = [r for g in groups for m, r in enumerate(g.rollouts) if m != 1]
    assert batch.rows == 12
    assert batch.token_count == int(batch.mask.sum()) == sum(sum(r.mask) for r in whole)
    assert batch.advantages.any(axis=1).sum().item() <= 8


def test_a_batch_that_was_cut_off_altogether_changes_nothing_and_says_so(load_tiny):
    model, trainer, groups = setup(load_tiny, truncated="mask")
    before = weights(model)
    metrics = trainer.train(cut_off(groups, {0, 1, 2}))
    assert metrics["update_skipped/no_signal"] == 1
    assert moves(model, before) == 0
    assert {metrics["clip_ratio/low_min"], metrics["clip_ratio/high_max"]} == {0}
    assert all(math.isfinite(value) for value in metrics.values())


def test_what_was_cut_off_is_no_extreme_of_the_others():
    of_nothing = {"share": 0.0, "share_min": 0.0, "ratio_max": 1.0}
    counted = {"share": 0.25, "share_min": 0.5, "ratio_max": 0.9}
    assert sum_micro_batches([(of_nothing, False), (counted, True)]) == counted
    assert sum_micro_batches([(of_nothing, False), (of_nothing, False)]) == of_nothing


def test_checkpointed_gradients_make_the_same_update(load_tiny):
    results = []
    for again in (False, True):
        model, trainer, groups = setup(load_tiny, checkpoint_gradients=again)
        trainer.train(groups)
        results.append(weights(model))
    for name, value in results[0].items():
        assert np.abs(results[1][name] - value).max() < 1e-6, name


def test_advantage_functions_get_the_lengths_and_parts_that_they_ask_for(load_tiny):
    asked = {}

    def curious(rewards, *, lengths, parts, eps=1.0):
        asked.update(rewards=rewards, lengths=lengths, parts=parts)
        return gdpo.compute_advantages(rewards, parts=parts)

    _, trainer, groups = setup(load_tiny, advantage_fn=curious)
    groups = [
        replace(g, rollouts=[replace(r, rewards={"double": 2 * r.reward}) for r in g.rollouts])
        for g in groups
    ]
    trainer.train(groups)
    assert asked["lengths"].tolist() == [[sum(r.mask) for r in g.rollouts] for g in groups]
    assert asked["parts"]["double"].tolist() == (2 * asked["rewards"]).tolist()


def test_an_advantage_function_that_asks_for_more_is_refused(load_tiny):
    with pytest.raises(
        ConfigError, match=r"requires the arguments \['values'\].*functools.partial"
    ):
        setup(load_tiny, advantage_fn=lambda rewards, values: rewards)
    with pytest.raises(ConfigError, match="expected one advantage for each reward"):
        setup(load_tiny, advantage_fn=lambda rewards: rewards[0])[1].train(setup(load_tiny)[2])


def test_a_rejected_batch_is_kept_and_ten_in_a_row_end_the_run(load_tiny, tmp_path):
    def poisoned(logp, batch):
        loss, metrics = grpo.policy_loss(logp, batch)
        return loss * float("nan"), metrics

    _, trainer, groups = setup(load_tiny, loss_fn=poisoned, rejected=tmp_path / "rejected")
    trainer.train(groups)
    (path,) = (tmp_path / "rejected").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rollouts = [r for g in groups for r in g.rollouts]
    assert [line["tokens"] for line in lines] == [r.tokens for r in rollouts]
    assert lines[0]["task"] == "0"
    with pytest.raises(TrainingError, match="NaN or infinite 10 times in a row"):
        for _ in range(9):
            trainer.train(groups)


def test_a_sampler_that_only_says_it_follows_is_found_out(load_tiny):
    _, trainer, groups = setup(load_tiny, optimizer=optim.SGD(learning_rate=0.1))
    trainer.train(groups)
    assert trainer.version == 1
    stale = [replace(g, rollouts=[replace(r, version=1) for r in g.rollouts]) for g in groups]
    with pytest.raises(TrainingError, match="still samples with the old weights"):
        trainer.train(stale)


def test_a_sampler_that_follows_is_not(load_tiny):
    model, trainer, groups = setup(load_tiny, optimizer=optim.SGD(learning_rate=0.1))
    trainer.train(groups)
    _, tokenizer = load_tiny()
    policy = create_policy(model, tokenizer, {"max_tokens": 10})
    again = collect(TASKS, policy, length_reward, group_size=3, seed=1)
    assert again[0].version == 1
    assert trainer.train(again)["sampling/sampling_logp_difference/mean"] < 1e-4


def test_preferences_are_learned(load_tiny):
    _, trainer, groups = setup(
        load_tiny,
        advantage_fn=dpo.compute_advantages,
        loss_fn=dpo.policy_loss,
        reference="base",
        optimizer=build_optimizer(3e-3),
        micro_batch_size=2,
    )
    pairs = [
        RolloutGroup(
            task=group.task,
            rollouts=[
                replace(r, reward=float(i), version=NOT_SAMPLED)
                for i, r in enumerate(group.rollouts[:2])
            ],
        )
        for group in groups
    ]
    differing = [p for p in pairs if p.rollouts[0].tokens != p.rollouts[1].tokens]
    assert len(differing) >= 3
    history = [trainer.train(differing) for _ in range(12)]
    assert history[-1]["rewards/accuracies"] == pytest.approx(1)
    assert history[-1]["loss"] < history[0]["loss"] - 0.1
    assert not any(name.startswith("sampling/") for name in history[0])


def test_a_student_comes_nearer_to_its_teacher(load_tiny):
    teacher, _, _ = setup(load_tiny)
    container = AdapterContainer.of(teacher)
    far = {n: 0.1 * mx.random.normal(v.shape) for n, v in container.parameters().items()}
    container.swap(far, version=0)
    model, trainer, _ = fresh_trainer(
        load_tiny,
        advantage_fn=distillation.compute_advantages,
        loss_fn=distillation.policy_loss,
        reference=teacher,
        optimizer=build_optimizer(2e-3),
    )
    _, tokenizer = load_tiny()
    policy = create_policy(model, tokenizer, {"max_tokens": 10})
    found = []
    for seed in range(16):
        groups = collect(TASKS, policy, length_reward, group_size=4, seed=seed)
        found.append(trainer.train(groups)["kl"])
    assert np.mean(found[-5:]) < 0.7 * np.mean(found[:3])


def test_reinforce_trains_weights_without_adapters(load_tiny):
    model, tokenizer = load_tiny()
    model.unfreeze()
    trainer = Trainer(
        model, reinforce.compute_advantages, reinforce.policy_loss, optim.SGD(learning_rate=0.1)
    )
    policy = create_policy(model, tokenizer, {"max_tokens": 6})
    before = weights(model)
    trainer.train(collect(TASKS, policy, length_reward, group_size=3, seed=0))
    assert moves(model, before) > 0
    assert trainer.version == 0
