"""The trainer: one update, the same however it is cut up, and never a silent one."""

import math
from collections import Counter
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.batches import batch_of
from tests.memory import peak_of
from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.algorithms import get, grpo
from textpolicy.errors import ConfigError, TrainingError
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.rollout.worker import collect
from textpolicy.training.batch import training_rows
from textpolicy.training.metrics import policy_metrics
from textpolicy.training.trainer import Trainer
from textpolicy.types import Task

TASKS = [Task(id=str(i), prompt=p) for i, p in enumerate(["1+2=", "Sort 52431", "?", "ab" * 9])]


TIMES = {"time/score", "time/update", "time/publish"}


def length_reward(prompt, completion, example):
    return len(completion) % 5 / 4


def constant_reward(prompt, completion, example):
    return 0.5


def setup(load_tiny, *, reward=length_reward, rank=4, **options):
    """An adapted tiny model with a nudge away from the base, its trainer, and rollouts of it."""
    model, tokenizer = load_tiny()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=rank, scale=2.0))
    nudged = {
        name: mx.random.normal(value.shape, key=mx.random.key(1)) * 0.01
        for name, value in container.parameters().items()
    }
    container.swap(nudged, version=0)
    policy = create_policy(model, tokenizer, {"max_tokens": 10})
    groups = collect(TASKS, policy, reward, group_size=3, seed=0)
    defaults = {
        "advantage_fn": grpo.compute_advantages,
        "loss_fn": grpo.policy_loss,
        "optimizer": optim.SGD(learning_rate=1.0),
    }
    return model, Trainer(model, **(defaults | options)), groups


def weights(model) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def test_micro_batches_change_memory_and_not_the_update(load_tiny):
    results = []
    for size in (None, 5, 1):
        model, trainer, groups = setup(load_tiny, micro_batch_size=size)
        results.append((trainer.train(groups), weights(model)))
    (whole, whole_weights), *others = results
    for metrics, moved in others:
        assert metrics.keys() == whole.keys()
        for name in whole.keys() - TIMES:
            assert metrics[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name
        for name, value in whole_weights.items():
            assert np.abs(moved[name] - value).max() < 1e-6, name


def test_micro_batches_bound_memory(load_tiny):
    peaks = {}
    for size in (None, 1):
        _, trainer, groups = setup(load_tiny, micro_batch_size=size)
        trainer.train(groups)
        peaks[size] = peak_of(partial(trainer.train, groups))
    assert peaks[1] < peaks[None] / 2


def test_only_adapter_weights_move(load_tiny):
    model, trainer, groups = setup(load_tiny)
    before = weights(model)
    trainer.train(groups)
    after = weights(model)
    moved = {name for name in before if not np.array_equal(after[name], before[name])}
    assert moved
    assert all(name.endswith(("lora_a", "lora_b")) for name in moved)


def test_recorded_and_recomputed_logprobs_agree_before_any_update(load_tiny):
    _, trainer, groups = setup(load_tiny)
    metrics = trainer.train(groups)
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-4
    assert metrics["clip_ratio/region_mean"] == 0


def test_rollouts_of_another_policy_are_refused_at_the_first_step(load_tiny):
    model, trainer, groups = setup(load_tiny)
    container = AdapterContainer.of(model)
    shaken = {n: mx.random.normal(v.shape) for n, v in container.parameters().items()}
    container.swap(shaken, version=0)
    with pytest.raises(TrainingError, match="log-probabilities of one version differ"):
        trainer.train(groups)


def test_a_constant_reward_moves_nothing_and_says_so(load_tiny):
    model, trainer, groups = setup(load_tiny, reward=constant_reward)
    before = weights(model)
    metrics = trainer.train(groups)
    assert metrics["update_skipped/no_signal"] == 1
    assert trainer.version == 0
    assert all(np.array_equal(value, before[name]) for name, value in weights(model).items())


class Poisoned(nn.Module):
    """Computes what another module does; its gradient is not a number."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __call__(self, x):
        run = mx.custom_function(self.module)
        run.vjp(lambda x, cotangent, _: mx.full(x.shape, math.nan))
        return run(x)


def test_where_nothing_is_learned_nothing_is_computed_backwards(load_tiny):
    for reward, name in ((constant_reward, "no_signal"), (length_reward, "not_finite")):
        model, trainer, groups = setup(load_tiny, reward=reward, skip_without_advantages=True)
        model.model.norm = Poisoned(model.model.norm)
        metrics = trainer.train(groups)
        assert metrics[f"update_skipped/{name}"] == 1
        assert metrics["entropy"] > 0


def test_a_loss_that_declares_nothing_is_computed_backwards_everywhere(load_tiny):
    model, trainer, groups = setup(load_tiny, reward=constant_reward)
    model.model.norm = Poisoned(model.model.norm)
    assert trainer.train(groups)["update_skipped/not_finite"] == 1


@pytest.mark.parametrize("terms", [{"beta": 0.5}, {"entropy_bonus": 0.1}])
def test_what_a_loss_has_beside_advantages_is_learned_from_every_group(load_tiny, terms):
    algorithm = get("grpo", **terms)
    options = dict(algorithm.trainer) | {"reference": "base", "loss_fn": algorithm.policy_loss}
    model, trainer, groups = setup(load_tiny, reward=constant_reward, **options)
    before = weights(model)
    assert trainer.train(groups)["update_skipped/no_signal"] == 0
    assert any(not np.array_equal(value, before[name]) for name, value in weights(model).items())


def test_a_loss_that_ignores_the_model_is_an_error(load_tiny):
    def detached(logp, batch):
        return grpo.policy_loss(mx.stop_gradient(logp), batch)

    _, trainer, groups = setup(load_tiny, loss_fn=detached)
    with pytest.raises(TrainingError, match="does not depend on the trainable weights"):
        trainer.train(groups)


def test_a_loss_without_metrics_is_refused(load_tiny):
    _, trainer, groups = setup(load_tiny, loss_fn=lambda logp, batch: logp.sum())
    with pytest.raises(ConfigError, match=r"an object of type array; expected \(loss, metrics\)"):
        trainer.train(groups)


def test_a_learning_rate_of_zero_is_an_error(load_tiny):
    _, trainer, groups = setup(load_tiny, optimizer=optim.SGD(learning_rate=0.0))
    with pytest.raises(TrainingError, match="moved no weight"):
        trainer.train(groups)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(load_tiny):
    def poisoned(logp, batch):
        loss, metrics = grpo.policy_loss(logp, batch)
        return loss * float("nan"), metrics

    model, trainer, groups = setup(load_tiny, loss_fn=poisoned)
    before = weights(model)
    metrics = trainer.train(groups)
    assert metrics["update_skipped/not_finite"] == 1
    assert all(np.array_equal(value, before[name]) for name, value in weights(model).items())


def test_the_gradient_is_clipped_to_its_norm(load_tiny):
    moves = []
    for limit in (math.inf, 1e-3):
        model, trainer, groups = setup(load_tiny, max_grad_norm=limit)
        before = weights(model)
        metrics = trainer.train(groups)
        after = weights(model)
        moves.append(math.sqrt(sum(((after[n] - before[n]) ** 2).sum() for n in before)))
    assert moves[0] == pytest.approx(metrics["grad_norm"], rel=1e-3)
    assert moves[1] == pytest.approx(1e-3, rel=1e-2)


def test_a_rollout_without_a_reward_changes_nothing(load_tiny):
    def picky(prompt, completion, example):
        return None if len(completion) % 2 else length_reward(prompt, completion, example)

    _, _, groups = setup(load_tiny, reward=picky)
    scored = sum(r.reward is not None for g in groups for r in g.rollouts)
    assert 0 < scored < 12
    assert len(training_rows(groups)) == scored


def test_truncated_sampling_is_refused_for_training(load_tiny):
    model, trainer, _ = setup(load_tiny)
    _, tokenizer = load_tiny()
    policy = create_policy(model, tokenizer, {"max_tokens": 4, "top_p": 0.9})
    groups = collect(TASKS, policy, length_reward, group_size=2, seed=0)
    with pytest.raises(TrainingError, match=r"top_p=0\.9.*cannot compute"):
        trainer.train(groups)


def test_options_are_checked_before_anything_moves(load_tiny):
    with pytest.raises(ConfigError, match="micro_batch_size is 0"):
        setup(load_tiny, micro_batch_size=0)
    with pytest.raises(ConfigError, match="max_grad_norm is 0"):
        setup(load_tiny, max_grad_norm=0.0)
    model, _ = load_tiny()
    model.freeze()
    with pytest.raises(ConfigError, match="no trainable weights"):
        Trainer(model, grpo.compute_advantages, grpo.policy_loss, optim.SGD(learning_rate=1.0))


def test_no_groups_is_an_error(load_tiny):
    _, trainer, _ = setup(load_tiny)
    with pytest.raises(TrainingError, match="collect some first"):
        trainer.train([])


@pytest.mark.learning
def test_a_policy_learns_a_one_token_bandit(load_tiny):
    model, tokenizer = load_tiny()
    AdapterContainer.from_model(model, AdapterConfig(rank=4))
    trainer = Trainer(
        model, grpo.compute_advantages, grpo.policy_loss, optim.Adam(learning_rate=5e-3)
    )
    policy = create_policy(model, tokenizer, {"max_tokens": 1})
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


def test_extremes_of_ratios_are_those_of_tokens_that_count():
    batch = batch_of([[1, 1, 0], [1, 0, 0]], [[-1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]], [1.0, -1.0])
    logp = mx.log(mx.array([[0.2, 0.1, 1.0], [0.3, 1.0, 1.0]]))
    metrics = policy_metrics(logp, mx.zeros(logp.shape), batch)
    ratios = [metrics[f"sampling/importance_sampling_ratio/{end}"].item() for end in ("min", "max")]
    assert ratios == pytest.approx([0.1 * np.e, 0.3 * np.e])
