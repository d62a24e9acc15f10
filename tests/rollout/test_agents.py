"""Agents that play against a policy: every answer as it was sampled, in segments, with a score."""

import re
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests.logprobs import token_logprobs
from textpolicy.environments import load
from textpolicy.environments.chat import ChatEnv
from textpolicy.environments.environment import Environment
from textpolicy.errors import ConfigError, TaskError
from textpolicy.evaluation.evaluate import HeldOut, evaluate
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import Rewards, scorer_of
from textpolicy.rollout.worker import collect
from textpolicy.training.batch import training_rows
from textpolicy.types import RolloutGroup, StopReason, Task

# Plain HTTP: a process with the `openai` client takes a second to start.
AGENT = """
import asyncio, http.client, json
from urllib.parse import urlsplit

MAX_TURNS = 5
MAX_TOKENS = 8

def make(rng):
    return f"{rng.randint(10, 99)}+1=", {"do": "talk"}

def ask(url, key, messages, **options):
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port)
    body = {"model": "gpt-4o", "messages": messages} | options
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = json.loads(connection.getresponse().read())
    if "error" in answer:
        raise RuntimeError(answer["error"]["code"])
    return [choice["message"]["content"] for choice in answer["choices"]]

async def play(prompt, example, base_url, api_key):
    first = [{"role": "user", "content": prompt}]
    def one(messages, **options):
        return ask(base_url, api_key, messages, **options)[0]
    def talk(count, **options):
        messages = list(first)
        for _ in range(count):
            messages.append({"role": "assistant", "content": one(messages, **options)})
            messages.append({"role": "user", "content": "more"})
    match example["do"]:
        case "talk":
            talk(3)
        case "rewrite":
            text = one(first)
            one([*first, {"role": "assistant", "content": text.upper() + "?"},
                 {"role": "user", "content": "more"}])
        case "gather":
            await asyncio.gather(*(asyncio.to_thread(one, [{"role": "user", "content": str(n)}])
                                   for n in range(4)))
        case "several":
            ask(base_url, api_key, first, n=3)
        case "greedy":
            talk(1, temperature=0.0, max_tokens=3)
        case "forever":
            talk(99)
        case "long":
            one([{"role": "user", "content": "7" * 4000}])
        case "long later":
            one(first)
            one([{"role": "user", "content": "7" * 4000}])
        case "raise":
            one(first)
            raise ValueError("no way")
        case "stolen":
            ask(base_url, "another key", first)
        case "unscored":
            one(first)
            return None
        case "silent":
            pass
    return 0.5
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Environment:
    path = tmp_path_factory.mktemp("agent") / "my_agent.py"
    path.write_text(AGENT)
    return load(f"agent:{path}", env_timeout=60, agent_processes=4)


@pytest.fixture(scope="module")
def policy(load_tiny) -> ModelPolicy:
    return create_policy(*load_tiny(), {"max_tokens": 8})


@pytest.fixture
def play(environment, policy):
    def collect_for(do: str, *, group_size: int = 2, seed: int = 0) -> RolloutGroup:
        task = Task(id="t", prompt="21+1=", example={"do": do}, agent=environment.agent)
        (group,) = collect([task], policy, environment.reward, group_size=group_size, seed=seed)
        return group

    return collect_for


def test_answers_are_kept_with_the_log_probabilities_of_their_sampled_tokens(play, policy):
    group = play("talk", group_size=4)
    for one in group.rollouts:
        assert (one.reward, one.rewards, one.version) == (0.5, {"earned": 0.5}, 0)
        assert len(one.turns) == 3
        assert one.turns[0].replies == [{"role": "user", "content": "more"}]
        assert one.metrics["env/turns"] == 3
        (segment,) = one.segments
        assert sum(segment.mask) == one.sampled
        expected, _ = token_logprobs(policy.model, mx.array([segment.tokens]), mx.ones(1))
        known = np.array(segment.mask)
        found = np.array(segment.logprobs)[known]
        assert np.allclose(found, np.array(expected[0])[known], atol=1e-4)
    assert len({tuple(one.tokens) for one in group.rollouts}) > 1


def test_the_same_seed_gives_the_same_rollouts_also_for_requests_at_the_same_time(play):
    for do in ("talk", "gather"):
        first, again, other = (
            [one.segments for one in play(do, seed=seed).rollouts] for seed in (3, 3, 4)
        )
        tokens = [
            [[segment.tokens for segment in segments] for segments in rollouts]
            for rollouts in (first, again, other)
        ]
        assert tokens[0] == tokens[1] != tokens[2]


def test_a_part_of_the_tasks_is_played_as_in_the_whole(environment, policy):
    tasks = [
        Task(id=str(n), prompt="21+1=", example={"do": "talk"}, agent=environment.agent)
        for n in range(2)
    ]
    options = {"group_size": 2, "seed": 3}
    whole = collect(tasks, policy, environment.reward, **options)
    (part,) = collect(tasks[1:], policy, environment.reward, first=1, **options)
    whole, part = ([[one.tokens for one in g.rollouts] for g in gs] for gs in (whole, [part]))
    assert part == whole[1:] != whole[:1]


def test_what_an_agent_rewrites_starts_a_new_segment_and_no_token_counts_twice(play):
    for do, segments, turns in (("rewrite", 2, 2), ("gather", 4, 4), ("several", 3, 3)):
        for one in play(do).rollouts:
            assert len(one.segments) == segments == one.metrics["rollout/segments"]
            assert len(one.turns) == turns
            assert all(any(segment.mask) for segment in one.segments)
            assert one.sampled <= 8 * turns


def test_an_agent_that_talks_as_an_environment_does_reads_and_samples_the_same_tokens(
    environment, policy
):
    """Greedy answers, because an agent's draws have seeds of their own."""
    greedy = create_policy(policy.model, policy.tokenizer, {"max_tokens": 8, "temperature": 0.0})

    def env() -> ChatEnv:
        draw = lambda rng: ("21+1=", {})  # noqa: E731
        return ChatEnv(draw, lambda answers, example: "more", lambda completion: 0.5, max_turns=3)

    task = Task(id="t", prompt="21+1=", example={"do": "talk"})
    agent, built_in = (
        collect([one], greedy, environment.reward, group_size=1, seed=0)[0].rollouts[0]
        for one in (replace(task, agent=environment.agent), replace(task, env=env))
    )
    assert agent.tokens == built_in.tokens
    assert agent.mask == built_in.mask
    assert np.allclose(agent.logprobs, built_in.logprobs, atol=1e-4)
    assert [turn.completion for turn in agent.turns] == [one.completion for one in built_in.turns]


def test_the_sampling_of_the_run_is_kept_whatever_an_agent_asks_for(play, policy):
    for one in play("greedy").rollouts:
        assert one.sampling == policy.sampling
        assert one.metrics["rollout/other_sampling"] == 1.0
        assert one.sampled <= 3
    sampled = {tuple(one.tokens) for one in play("greedy", group_size=8).rollouts}
    assert len(sampled) > 1
    assert play("talk").rollouts[0].metrics["rollout/other_sampling"] == 0.0


def test_a_rollout_that_reaches_a_limit_is_cut_off_and_no_error(play):
    for do, turns in (("forever", 5), ("long later", 1)):
        for one in play(do).rollouts:
            assert one.stop_reason is StopReason.LENGTH
            assert len(one.turns) == turns
            assert one.error is None
            assert one.reward == 0.0


FAILURES = {
    "raise": r"agent, task t: agent play raised ValueError: no way \(.*my_agent.py, line",
    "stolen": "RuntimeError: invalid_api_key",
    "unscored": "the agent gave no score",
    "silent": "ended without an answer of the policy",
    "long": "context_length_exceeded",
}


def test_a_failure_of_an_agent_ends_the_run_or_costs_what_on_error_says(environment, policy):
    tasks = [
        Task(id="t", prompt="21+1=", example={"do": do}, agent=environment.agent) for do in FAILURES
    ]
    with pytest.raises(TaskError, match=FAILURES["raise"]):
        collect(tasks[:1], policy, environment.reward, group_size=2, seed=0)
    for on_error, value in (("skip", None), (-1.0, -1.0)):
        reward = Rewards(environment.reward, on_error=on_error, max_error_rate=1.0)
        groups = collect(tasks, policy, reward, group_size=1, seed=0)
        for message, group in zip(FAILURES.values(), groups, strict=True):
            (one,) = group.rollouts
            assert one.reward == value
            assert one.error is not None
            assert re.search(message, one.error)
    # A rollout without any token has nothing to train on.
    assert [row.group for row in training_rows(groups)] == [0, 2]


def test_a_reward_function_scores_what_an_agent_leaves_unscored(environment, policy):
    def replies(completion, messages, turns, turn_rewards, example) -> float:
        assert messages[-1]["content"] == completion == turns[-1]
        return float(len(messages))

    tasks = [
        Task(id="t", prompt="21+1=", example={"do": do}, agent=environment.agent)
        for do in ("unscored", "talk")
    ]
    groups = collect(tasks, policy, replies, group_size=2, seed=0)
    assert [[one.reward for one in group.rollouts] for group in groups] == [[2, 2], [6, 6]]


def test_evaluations_play_greedily_through_the_same_door(environment, policy):
    tasks = environment.heldout(3)
    with scorer_of(environment.reward) as scorer:
        heldout = HeldOut(name="e", tasks=tasks, scorer=scorer, max_tokens=8)
        first, again = (evaluate(policy, heldout, samples=2) for _ in range(2))
    assert first.greedy_reward.reward == 0.5
    assert [one.tokens for one in first.greedy] == [one.tokens for one in again.greedy]
    assert first.greedy[0].sampling.temperature == 0
    assert len(first.sampled) == 3


def test_a_policy_without_a_model_and_tasks_of_two_agents_are_refused(environment, policy):
    class Words:
        version = 0

        def generate(self, prompts, *, n=1, seed=None):
            raise NotImplementedError

        def reload(self, path):
            return 0

    task = environment.heldout(1)[0]
    with pytest.raises(ConfigError, match="has no model that a server could sample from"):
        collect([task], Words(), environment.reward, group_size=1, seed=0)
    with pytest.raises(ConfigError, match="one agent at a time"):
        collect([task, Task(id="x", prompt="1")], policy, environment.reward, group_size=1, seed=0)


def test_without_the_library_of_the_server_the_error_says_what_to_install(
    environment, policy, monkeypatch
):
    monkeypatch.setitem(sys.modules, "textpolicy.serving.app", None)
    with pytest.raises(ConfigError, match=r"pip install 'textpolicy\[serve\]'"):
        collect(environment.heldout(1), policy, environment.reward, group_size=1, seed=0)
