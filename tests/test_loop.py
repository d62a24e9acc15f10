"""The training loop: versions advance, the policy reloads, and reports hold what was trained on."""

import itertools

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from tests.test_types import rollout
from textpolicy.adapters import AdapterConfig, AdapterContainer, shared_copy
from textpolicy.algorithms import grpo
from textpolicy.errors import ConfigError, TaskError, TrainingError
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.loop import train_rl
from textpolicy.rollout.worker import collect
from textpolicy.tracking.rollout_metrics import rollout_metrics
from textpolicy.training.trainer import Trainer
from textpolicy.types import Completion, Progress, RolloutGroup, Sampling, StopReason, Task


class ListPolicy:
    """A policy that returns the texts of a list in turn."""

    def __init__(self, texts: list[str], version: int = 0) -> None:
        self.texts = itertools.cycle(texts)
        self.version = version

    def generate(self, prompts, *, n=1, seed=None):
        return [[self._complete(prompt) for _ in range(n)] for prompt in prompts]

    def reload(self, path):
        return self.version

    def _complete(self, prompt):
        text = next(self.texts)
        return Completion(
            prompt_tokens=list(prompt.encode()),
            tokens=[*text.encode(), 0],
            logprobs=[-0.5] * (len(text) + 1),
            text=text,
            stop_reason=StopReason.STOP_TOKEN,
            sampling=Sampling(),
            version=self.version,
        )


def tasks():
    for number in itertools.count():
        yield Task(id=str(number), prompt=f"{number}+1=", example={"answer": str(number + 1)})


def digits(prompt, completion, example):
    return sum(c.isdigit() for c in completion) / 4


def circle(load_tiny, tmp_path, **options):
    model, tokenizer = load_tiny()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=4))
    container.publish_path = tmp_path / "adapters.safetensors"
    policy = create_policy(shared_copy(model), tokenizer, {"max_tokens": 6})
    trainer = Trainer(
        model, grpo.compute_advantages, grpo.policy_loss, optim.Adam(learning_rate=1e-3), **options
    )
    return policy, trainer


def test_collect_keeps_the_sampled_tokens_and_scores_them_with_their_own_example():
    """
    tokens  A : x 0      prompt "A:" of task A, sampled "x" and the stop token 0
    mask    . . x x
    """
    policy = ListPolicy(["x", "yy", "x", "yy"], version=3)
    seen = []

    def reward(prompt, completion, example):
        seen.append((prompt, completion, example["n"]))
        return float(len(completion))

    batch = [Task(id=n, prompt=f"{n}:", example={"n": n}) for n in "AB"]
    groups = collect(batch, policy, reward, group_size=2, seed=0)
    assert seen == [("A:", "x", "A"), ("A:", "yy", "A"), ("B:", "x", "B"), ("B:", "yy", "B")]
    first = groups[0].rollouts[0]
    assert first.tokens == [*b"A:x", 0]
    assert first.mask == [False, False, True, True]
    assert first.logprobs == [0, 0, -0.5, -0.5]
    assert (first.reward, first.version) == (1.0, 3)
    assert [r.reward for r in groups[1].rollouts] == [1.0, 2.0]


def test_each_generation_uses_the_latest_weights(load_tiny, tmp_path):
    policy, trainer = circle(load_tiny, tmp_path)
    reports = []
    train_rl(
        tasks=tasks(),
        reward=digits,
        policy=policy,
        trainer=trainer,
        steps=3,
        groups_per_step=4,
        group_size=4,
        on_step=reports.append,
    )
    assert [report.metrics["version"] for report in reports] == [1, 2, 3]
    assert [{g.version for g in report.groups} for report in reports] == [{0}, {1}, {2}]
    # A policy with stale weights would disagree with the trainer from the second step on.
    for report in reports:
        assert report.metrics["sampling/sampling_logp_difference/mean"] < 1e-4
    sampled, trained = AdapterContainer.of(policy.model), trainer.adapters
    assert sampled is not trained
    for name, value in trained.parameters().items():
        assert (sampled.parameters()[name] == value).all().item()


@pytest.mark.slow
def test_a_step_reports_the_groups_it_trained_on_with_their_advantages(load_tiny, tmp_path):
    policy, trainer = circle(load_tiny, tmp_path)
    reports = []
    train_rl(
        tasks=tasks(),
        reward=lambda completion: None if completion.startswith("1") else len(completion) / 8,
        policy=policy,
        trainer=trainer,
        steps=4,
        groups_per_step=2,
        group_size=4,
        steps_per_generation=2,
        on_step=reports.append,
    )
    assert [len(report.groups) for report in reports] == [4, 0, 4, 0]
    assert [report.metrics["staleness/max"] for report in reports] == [0, 1, 0, 1]
    for report in reports:
        assert len(report.trained) == 2
        for group, advantages in zip(report.trained, report.advantages, strict=True):
            rewards = [r.reward for r in group.rollouts]
            scored = mx.array([[mx.nan if r is None else r for r in rewards]])
            wanted = grpo.compute_advantages(scored)[0].tolist()
            for score, advantage, value in zip(rewards, advantages, wanted, strict=True):
                assert advantage is None if score is None else abs(advantage - value) < 1e-6


def test_a_completion_that_is_not_trained_on_has_no_advantage(load_tiny, tmp_path):
    policy, trainer = circle(load_tiny, tmp_path, truncated="mask")
    groups = collect(
        list(itertools.islice(tasks(), 4)),
        create_policy(policy.model, policy.tokenizer, {"max_tokens": 2}),
        digits,
        group_size=4,
        seed=0,
    )
    trainer.train(groups)
    cut = [r.stop_reason is StopReason.LENGTH for group in groups for r in group.rollouts]
    assert any(cut) and not all(cut)
    assert [a is None for group in trainer.advantages for a in group] == cut


def test_a_run_ends_early_if_its_callback_returns_stop(load_tiny, tmp_path):
    policy, trainer = circle(load_tiny, tmp_path)
    seen = []
    numbers = itertools.count()

    def ever_higher(prompt, completion, example):
        return float(next(numbers))

    def on_step(report):
        seen.append(report.step)
        return Progress.STOP if report.step == 1 else Progress.MORE

    options = {"groups_per_step": 2, "group_size": 2, "on_step": on_step}
    train_rl(tasks=tasks(), reward=ever_higher, policy=policy, trainer=trainer, steps=9, **options)
    assert seen == [0, 1] and policy.version == trainer.version == 2


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(load_tiny, tmp_path):
    runs = []
    for attempt in range(2):
        policy, trainer = circle(load_tiny, tmp_path / str(attempt))
        metrics = train_rl(
            tasks=tasks(),
            reward=digits,
            policy=policy,
            trainer=trainer,
            steps=2,
            groups_per_step=2,
            group_size=4,
            seed=9,
        )
        runs.append(
            {
                k: v
                for k, v in metrics.items()
                if not k.startswith(("time/", "tokens_per", "memory/"))
            }
        )
    assert runs[0] == runs[1]


def test_a_policy_that_does_not_reload_is_an_error(load_tiny, tmp_path):
    policy, trainer = circle(load_tiny, tmp_path)

    class StalePolicy:
        version = 0

        def generate(self, prompts, *, n=1, seed=None):
            return policy.generate(prompts, n=n, seed=seed)

        def reload(self, path):
            return 0

    with pytest.raises(TrainingError, match="still generates with version 0"):
        train_rl(tasks=tasks(), reward=digits, policy=StalePolicy(), trainer=trainer, steps=2)


@pytest.mark.slow
def test_a_trainer_that_publishes_no_adapters_is_an_error_if_the_policy_must_reload(
    load_tiny, tmp_path
):
    policy, trainer = circle(load_tiny, tmp_path)
    trainer.adapters.publish_path = None
    with pytest.raises(ConfigError, match="publishes no adapters"):
        train_rl(tasks=tasks(), reward=digits, policy=policy, trainer=trainer, steps=1)


def test_a_list_of_tasks_is_used_once_and_its_end_is_an_error(load_tiny, tmp_path):
    policy, trainer = circle(load_tiny, tmp_path)
    seen = []
    with pytest.raises(TaskError, match="2 more were needed after 4, but only 1 were left"):
        train_rl(
            tasks=list(itertools.islice(tasks(), 5)),
            reward=digits,
            policy=policy,
            trainer=trainer,
            steps=5,
            groups_per_step=2,
            on_step=lambda report: seen.extend(group.task.id for group in report.groups),
        )
    assert seen == ["0", "1", "2", "3"]


@pytest.mark.slow
def test_training_all_weights_is_an_error_if_the_policy_samples_from_a_shared_copy(load_tiny):
    model, tokenizer = load_tiny()
    trainer = Trainer(model, grpo.compute_advantages, grpo.policy_loss, optim.Adam(1e-2))
    options = {"reward": digits, "trainer": trainer, "steps": 4, "groups_per_step": 4}
    with pytest.raises(TrainingError, match="log-probabilities of one version differ"):
        policy = create_policy(shared_copy(model), tokenizer, {"max_tokens": 6})
        train_rl(tasks=tasks(), policy=policy, **options)
    train_rl(tasks=tasks(), policy=create_policy(model, tokenizer, {"max_tokens": 6}), **options)


@pytest.mark.slow
def test_a_step_without_rewards_makes_no_update(load_tiny, tmp_path):
    policy, trainer = circle(load_tiny, tmp_path)
    options = {"policy": policy, "trainer": trainer, "groups_per_step": 1, "group_size": 2}
    metrics = train_rl(tasks=tasks(), reward=lambda p, c, e: None, steps=3, **options)
    assert metrics["update_skipped/no_signal"] == metrics["reward/unscored"] == 1
    assert "reward" not in metrics
    train_rl(tasks=tasks(), reward=digits, steps=1, **options)
    with pytest.raises(TrainingError, match="returned None for every sample of 10 steps in a row"):
        train_rl(tasks=tasks(), reward=lambda p, c, e: None, steps=11, **options)


def test_rollout_metrics_equal_numbers_computed_by_hand():
    cut = {"stop_reason": StopReason.LENGTH, "reward": 0.0}
    groups = [
        RolloutGroup(task=Task(id="a", prompt="a"), rollouts=[rollout(), rollout(**cut)]),
        RolloutGroup(task=Task(id="b", prompt="b"), rollouts=[rollout(), rollout(reward=None)]),
    ]
    metrics = rollout_metrics(groups)
    assert metrics["reward"] == pytest.approx(2 / 3)
    assert metrics["reward_std"] == 0.25
    assert metrics["reward/unscored"] == 0.25
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["completions/clipped_ratio"] == 0.25
    assert metrics["completions/mean_length"] == 2
    assert metrics["num_tokens"] == 8
