"""The trainer: one update, the same for every micro-batch size, and errors for useless runs."""

import json
import math
from collections import Counter
from functools import partial
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from tests.memory import peak_of
from tests.training.trainers import (
    TASKS,
    TIME_METRICS,
    adapted_model,
    assert_same_weights,
    change_rollouts,
    constant_reward,
    distance,
    length_reward,
    make_trainer,
    rising_reward,
    sample,
    weights,
)
from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.algorithms import cispo, get, grpo, gspo, reinforce
from textpolicy.errors import ConfigError, TrainingError
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.rollout.worker import collect
from textpolicy.training.trainer import Trainer
from textpolicy.types import Task

# The update


def test_micro_batches_change_no_update_and_no_metric():
    results = []
    for size in (None, 5, 1):
        model, trainer, groups = make_trainer(micro_batch_size=size)
        results.append((trainer.train(groups), weights(model)))
    (whole, whole_weights), *others = results
    for metrics, moved in others:
        assert metrics.keys() == whole.keys()
        for name in whole.keys() - TIME_METRICS:
            assert metrics[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name
        assert_same_weights(moved, whole_weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "share"),
    [
        (partial(grpo.policy_loss, clip_low=1e-3, clip_high=1e-3), "clip_ratio/region_mean"),
        (partial(gspo.policy_loss, clip_low=1e-3, clip_high=1e-3), "clip_ratio/region_mean"),
        (partial(cispo.policy_loss, cap=1.001), "cispo_clip_ratio"),
    ],
)
def test_micro_batches_of_one_token_change_no_clipped_share(loss, share):
    model, tokenizer = adapted_model()
    short = create_policy(model, tokenizer, {"max_tokens": 1})
    one_token = collect(TASKS[:1], short, rising_reward(), group_size=3, seed=0)
    results = []
    for size in (None, 1):
        _, trainer, groups = make_trainer(micro_batch_size=size, loss_fn=loss, epochs=2)
        results.append(trainer.train([*one_token, *groups[2:]]))
    whole, one_by_one = results
    assert whole[share] > 0
    for name in whole.keys() - TIME_METRICS:
        assert one_by_one[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_micro_batches_bound_memory():
    peaks = {}
    for size in (None, 4):
        _, trainer, groups = make_trainer(micro_batch_size=size)
        groups = groups * 6
        trainer.train(groups)
        peaks[size] = peak_of(partial(trainer.train, groups))
    assert peaks[4] < peaks[None] / 3


@pytest.mark.slow
def test_checkpointed_gradients_make_the_same_update():
    results = []
    for checkpoint in (False, True):
        model, trainer, groups = make_trainer(checkpoint_gradients=checkpoint)
        trainer.train(groups)
        results.append(weights(model))
    assert_same_weights(results[1], results[0])


def test_only_adapter_weights_move():
    model, trainer, groups = make_trainer()
    before = weights(model)
    trainer.train(groups)
    after = weights(model)
    moved = {name for name in before if not np.array_equal(after[name], before[name])}
    assert moved
    assert all(name.endswith(("lora_a", "lora_b")) for name in moved)


def test_a_model_without_adapters_is_trained_too(load_tiny):
    model, tokenizer = load_tiny()
    model.unfreeze()
    trainer = Trainer(model, reinforce.compute_advantages, reinforce.policy_loss, optim.SGD(0.1))
    before = weights(model)
    trainer.train(sample(model, tokenizer))
    assert distance(model, before) > 0
    assert trainer.version == 0


@pytest.mark.slow
def test_the_gradient_is_clipped_to_its_norm():
    moves = []
    for limit in (math.inf, 1e-3):
        model, trainer, groups = make_trainer(max_grad_norm=limit)
        before = weights(model)
        metrics = trainer.train(groups)
        moves.append(distance(model, before))
    assert moves[0] == pytest.approx(metrics["grad_norm"], rel=1e-3)
    assert moves[1] == pytest.approx(1e-3, rel=1e-2)


def test_recorded_and_recomputed_logprobs_agree_before_any_update():
    _, trainer, groups = make_trainer()
    metrics = trainer.train(groups)
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-4
    assert metrics["clip_ratio/region_mean"] == 0


@pytest.mark.learning
def test_a_policy_learns_a_one_token_bandit(load_tiny):
    model, tokenizer = load_tiny()
    AdapterContainer.from_model(model, AdapterConfig(rank=4))
    trainer = Trainer(
        model, grpo.compute_advantages, grpo.policy_loss, optim.Adam(learning_rate=5e-3)
    )
    policy = create_policy(model, tokenizer, {"max_tokens": 1, "temperature": 1.5})
    task = Task(id="bandit", prompt="Pick a letter")
    (draws,) = policy.generate([task.prompt], n=256, seed=0)
    arms = Counter(completion.text for completion in draws).most_common()
    arm, count = next((text, count) for text, count in arms if count < 128)
    rates = [count / 256]
    for step in range(60):
        groups = collect(
            [task] * 4, policy, lambda p, c, e: float(c == arm), group_size=8, seed=step
        )
        rates.append(float(np.mean([r.reward for g in groups for r in g.rollouts])))
        trainer.train(groups)
    assert rates[0] < 0.5
    assert np.mean(rates[-5:]) > 0.9


# Groups and gradients without signal


class NanGradient(nn.Module):
    """Computes the function of another module; its gradient is NaN."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __call__(self, x):
        run = mx.custom_function(self.module)
        run.vjp(lambda x, cotangent, _: mx.full(x.shape, math.nan))
        return run(x)


def nan_loss(logp, batch):
    loss, metrics = grpo.policy_loss(logp, batch)
    return loss * math.nan, metrics


def test_a_constant_reward_moves_nothing_and_is_reported():
    model, trainer, groups = make_trainer(reward=constant_reward)
    before = weights(model)
    metrics = trainer.train(groups)
    assert metrics["update_skipped/no_signal"] == 1
    assert trainer.version == 0
    assert distance(model, before) == 0


def test_groups_without_signal_have_no_backward_pass_if_the_trainer_skips_them():
    for reward, name in ((constant_reward, "no_signal"), (length_reward, "not_finite")):
        model, trainer, groups = make_trainer(reward=reward, skip_without_advantages=True)
        model.model.norm = NanGradient(model.model.norm)
        metrics = trainer.train(groups)
        assert metrics[f"update_skipped/{name}"] == 1
        assert metrics["entropy"] > 0


def test_groups_without_signal_have_a_backward_pass_by_default():
    model, trainer, groups = make_trainer(reward=constant_reward)
    model.model.norm = NanGradient(model.model.norm)
    assert trainer.train(groups)["update_skipped/not_finite"] == 1


@pytest.mark.parametrize("terms", [{"beta": 0.5}, {"entropy_bonus": 0.1}])
def test_kl_and_entropy_terms_are_learned_from_groups_without_signal(terms):
    algorithm = get("grpo", **terms)
    options = dict(algorithm.trainer) | {"reference": "base", "loss_fn": algorithm.policy_loss}
    model, trainer, groups = make_trainer(reward=constant_reward, **options)
    before = weights(model)
    assert trainer.train(groups)["update_skipped/no_signal"] == 0
    assert distance(model, before) > 0


@pytest.mark.proves("F6")
def test_a_gradient_that_is_not_finite_is_skipped_kept_and_ends_the_run_after_ten(tmp_path):
    model, trainer, groups = make_trainer(loss_fn=nan_loss, rejected=tmp_path / "rejected")
    before = weights(model)
    assert trainer.train(groups)["update_skipped/not_finite"] == 1
    assert distance(model, before) == 0
    (path,) = (tmp_path / "rejected").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [r.tokens for g in groups for r in g.rollouts]
    assert lines[0]["task"] == "0"
    with pytest.raises(TrainingError, match="NaN or infinite 10 times in a row"):
        for _ in range(9):
            trainer.train(groups)


@pytest.mark.proves("F6")
@pytest.mark.parametrize(
    ("where", "number"),
    [
        *product(["reward", "advantage"], [1e300, -1e39, math.inf, -math.inf]),
        # A reward of NaN is a missing one.
        ("advantage", math.nan),
    ],
)
def test_extreme_rewards_and_advantages_are_a_skipped_update_with_numbers_in_its_metrics(
    where, number
):
    def extreme(rewards):
        return [[number] * rewards.shape[1]] * rewards.shape[0]

    options = {"advantage_fn": extreme} if where == "advantage" else {}
    model, trainer, groups = make_trainer(**options)
    if where == "reward":
        groups = change_rollouts(groups, lambda r, m: {"reward": number if m else 0.0})
    before = weights(model)
    metrics = trainer.train(groups)
    assert metrics["update_skipped/not_finite"] == 1
    assert distance(model, before) == 0
    assert all(type(value) is float for value in metrics.values())


def test_groups_of_which_only_the_first_rollout_has_a_reward_have_no_signal():
    model, trainer, groups = make_trainer()
    before = weights(model)
    metrics = trainer.train(change_rollouts(groups, lambda r, m: {"reward": None if m else 1.0}))
    assert metrics["update_skipped/no_signal"] == 1
    assert distance(model, before) == 0


@pytest.mark.parametrize("kind", [lambda x: x > 0, np.array, lambda x: x.astype(mx.bfloat16)])
def test_advantages_may_be_any_array_of_numbers(kind):
    _, trainer, groups = make_trainer(advantage_fn=lambda x: kind(grpo.compute_advantages(x)))
    assert trainer.train(groups)["grad_norm"] > 0


@pytest.mark.parametrize("returned", [None, "high", [["1"] * 3] * 4, np.ones((4, 3), complex)])
def test_advantages_that_are_no_numbers_are_refused(returned):
    _, trainer, groups = make_trainer(advantage_fn=lambda rewards: returned)
    with pytest.raises(ConfigError, match="one real number for each reward"):
        trainer.train(groups)


# Errors


def test_a_loss_that_ignores_the_model_is_an_error():
    def detached(logp, batch):
        return grpo.policy_loss(mx.stop_gradient(logp), batch)

    _, trainer, groups = make_trainer(loss_fn=detached)
    with pytest.raises(TrainingError, match="does not depend on the trainable weights"):
        trainer.train(groups)


def test_a_loss_without_metrics_is_refused():
    _, trainer, groups = make_trainer(loss_fn=lambda logp, batch: logp.sum())
    with pytest.raises(ConfigError, match=r"an object of type array; expected \(loss, metrics\)"):
        trainer.train(groups)


def test_a_learning_rate_of_zero_is_an_error():
    _, trainer, groups = make_trainer(optimizer=optim.SGD(learning_rate=0.0))
    with pytest.raises(TrainingError, match="moved no weight"):
        trainer.train(groups)


@pytest.mark.proves("F17")
def test_rollouts_of_another_policy_are_refused_at_the_first_step():
    model, trainer, groups = make_trainer()
    container = AdapterContainer.of(model)
    other = {n: mx.random.normal(v.shape) for n, v in container.parameters().items()}
    container.swap(other, version=0)
    with pytest.raises(TrainingError, match="log-probabilities of one version differ"):
        trainer.train(groups)


@pytest.mark.proves("F17")
def test_a_sampler_with_old_weights_and_a_new_version_is_refused():
    _, trainer, groups = make_trainer(optimizer=optim.SGD(learning_rate=0.1))
    trainer.train(groups)
    assert trainer.version == 1
    with pytest.raises(TrainingError, match="still samples with the old weights"):
        trainer.train(change_rollouts(groups, lambda rollout, m: {"version": 1}))


@pytest.mark.proves("F17")
def test_a_sampler_with_new_weights_is_accepted(load_tiny):
    model, trainer, groups = make_trainer(optimizer=optim.SGD(learning_rate=0.1))
    trainer.train(groups)
    again = sample(model, load_tiny()[1], seed=1)
    assert again[0].version == 1
    assert trainer.train(again)["sampling/sampling_logp_difference/mean"] < 1e-4


@pytest.mark.proves("F17")
def test_a_sampler_with_old_weights_is_refused_also_if_only_some_rollouts_have_the_new_version():
    _, trainer, groups = make_trainer(optimizer=optim.SGD(learning_rate=0.05))
    trainer.train(groups)
    some_new = change_rollouts(groups, lambda rollout, m: {"version": m % 2})
    with pytest.raises(TrainingError, match="still samples with the old weights"):
        trainer.train(some_new)


def test_the_sampler_is_checked_by_rollouts_whose_tokens_are_all_of_the_current_version(load_tiny):
    model, trainer, groups = make_trainer(optimizer=optim.SGD(learning_rate=0.1))
    trainer.train(groups)

    def of_old_and_new_tokens(rollout, m):
        if m % 2:
            return {}
        # The tokens of version 0 have log-probabilities that the new adapters do not give.
        first = rollout.mask.index(True)
        logprobs = [*rollout.logprobs[:first], -9.0, *rollout.logprobs[first + 1 :]]
        versions = [0 if n == first else 1 for n in range(len(rollout.mask))]
        return {"logprobs": logprobs, "version": 0, "versions": versions}

    again = change_rollouts(sample(model, load_tiny()[1], seed=1), of_old_and_new_tokens)
    assert trainer.train(again)["sampling/sampling_logp_difference/mean"] > 0.1
    assert trainer.version == 2


def test_truncated_sampling_is_refused_for_training(load_tiny):
    model, trainer, _ = make_trainer()
    policy = create_policy(model, load_tiny()[1], {"max_tokens": 4, "top_p": 0.9})
    groups = collect(TASKS, policy, length_reward, group_size=2, seed=0)
    with pytest.raises(TrainingError, match=r"top_p=0\.9.*cannot compute log-probabilities"):
        trainer.train(groups)


def test_options_are_checked_before_training(load_tiny):
    with pytest.raises(ConfigError, match="micro_batch_size is 0"):
        make_trainer(micro_batch_size=0)
    with pytest.raises(ConfigError, match="max_grad_norm is 0"):
        make_trainer(max_grad_norm=0.0)
    with pytest.raises(ConfigError, match=r"reward_kl is 0\.1, and there is no reference"):
        make_trainer(reward_kl=0.1)
    model, _ = load_tiny()
    parts = (grpo.compute_advantages, grpo.policy_loss, optim.SGD(learning_rate=1.0))
    with pytest.raises(ConfigError, match=r"reference is 'base'.*has none"):
        Trainer(model, *parts, reference="base")
    model.freeze()
    with pytest.raises(ConfigError, match="no trainable weights"):
        Trainer(model, *parts)


def test_no_groups_is_an_error():
    _, trainer, _ = make_trainer()
    with pytest.raises(TrainingError, match="collect some first"):
        trainer.train([])
