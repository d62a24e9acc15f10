"""Rollouts whose tokens are of several versions, because new adapters came while they were played.

Another process publishes versions as fast as it can. Every recorded log-probability must be that of
the version which the token carries.
"""

import numpy as np
import pytest

from tests.adapter_versions import AdapterVersions
from textpolicy.environments import ChatEnv, load, sum_turn_rewards
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rollout.segments import join_completions
from textpolicy.rollout.worker import collect
from textpolicy.tracking.rollout_metrics import staleness_metrics
from textpolicy.tracking.samples import sample_rows
from textpolicy.types import (
    NOT_SAMPLED,
    Completion,
    Rollout,
    RolloutGroup,
    Sampling,
    StopReason,
    Task,
)

# Many turns end with such a letter, so that episodes have several turns.
SAMPLING = Sampling(max_tokens=24, temperature=3.0, stop=("a", "e", "t", "1"))


@pytest.fixture(scope="module")
def loaded(load_tiny):
    return load_tiny()


@pytest.fixture(scope="module")
def versions(loaded, tmp_path_factory) -> AdapterVersions:
    return AdapterVersions(loaded[0], tmp_path_factory.mktemp("versions"), 12)


def talk() -> ChatEnv:
    """Return an environment that asks again, whatever the answer is."""
    return ChatEnv(
        lambda rng: ("Count: 1 2 3", {}),
        lambda answers, example: "Go on.",
        turn_reward=lambda answers, example: 0.5,
        max_turns=3,
    )


def check(versions: AdapterVersions, groups: list[RolloutGroup], **how: bool) -> list[Rollout]:
    """Check every rollout against the versions of its tokens; return those with several."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    mixed = [rollout for rollout in rollouts if len(rollout.sampled_by_version) > 1]
    for rollout in mixed:
        assert rollout.version == min(rollout.sampled_by_version)
        for segment in rollout.segments:
            assert [v != NOT_SAMPLED for v in segment.versions] == segment.mask
            expected = versions.replay(segment, temperature=SAMPLING.temperature, **how)
            assert np.allclose(segment.logprobs, expected, atol=1e-4)
    plain = [rollout for rollout in rollouts if rollout not in mixed]
    assert not any(segment.versions for rollout in plain for segment in rollout.segments)
    return mixed


def test_turns_with_an_environment_carry_the_versions_of_their_tokens(loaded, versions, tmp_path):
    path = tmp_path / "adapters.safetensors"
    tasks = [Task(id="t", prompt="Count: 1 2 3", env=talk)]
    with versions.published_in_turn(path):
        policy = ModelPolicy(*loaded, SAMPLING, follow=path, swap="tokens")
        groups = collect(tasks, policy, sum_turn_rewards, group_size=4, seed=0)
    mixed = check(versions, groups)
    assert mixed
    assert any(len(rollout.turns) > 1 for rollout in mixed)


AGENT = """
import http.client, json
from urllib.parse import urlsplit

MAX_TURNS = 4
MAX_TOKENS = 24

def make(rng):
    return "Count: 1 2 3", {}

def play(prompt, example, base_url, api_key):
    parts = urlsplit(base_url)
    headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
    messages = [{"role": "user", "content": prompt}]
    for _ in range(3):
        connection = http.client.HTTPConnection(parts.hostname, parts.port)
        body = json.dumps({"model": "any", "messages": messages})
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = json.loads(connection.getresponse().read())
        messages.append(answer["choices"][0]["message"])
        messages.append({"role": "user", "content": "Go on."})
    return 0.5
"""


@pytest.mark.parametrize("merge", [False, True])
def test_answers_to_an_agent_carry_versions_and_later_prompts_are_read_with_new_adapters(
    loaded, versions, tmp_path, merge
):
    (tmp_path / "agent.py").write_text(AGENT)
    environment = load(f"agent:{tmp_path / 'agent.py'}", env_timeout=60)
    path = tmp_path / "adapters.safetensors"
    tasks = [Task(id="t", prompt="Count: 1 2 3", agent=environment.agent)]
    with versions.published_in_turn(path):
        options = {"follow": path, "swap": "tokens", "merge_adapters": merge}
        policy = ModelPolicy(*loaded, SAMPLING, **options)
        groups = collect(tasks, policy, environment.reward, group_size=2, seed=0)
    assert check(versions, groups, reads_again=True)


def completion(prompt: list[int], tokens: list[int], version: int, *versions: int) -> Completion:
    return Completion(
        prompt_tokens=prompt,
        tokens=tokens,
        logprobs=[-0.5] * len(tokens),
        text="",
        stop_reason=StopReason.STOP_TOKEN,
        sampling=Sampling(),
        version=version,
        versions=list(versions),
    )


def test_segments_have_versions_only_if_the_tokens_are_of_several():
    turns = [completion([1, 2], [3, 4], 7), completion([1, 2, 3, 4, 5], [6], 7)]
    (same,) = join_completions(turns)
    assert same.versions == []
    (between_turns,) = join_completions([turns[0], completion([1, 2, 3, 4, 5], [6], 8)])
    assert between_turns.versions == [-1, -1, 7, 7, -1, 8]
    inside, other = join_completions([completion([1, 2], [3, 4], 7, 7, 8), completion([9], [9], 7)])
    assert {tuple(inside.versions), tuple(other.versions)} == {(-1, -1, 7, 8), (-1, 7)}


def test_staleness_is_that_of_groups_and_of_tokens():
    def rollout(tokens: int, version: int, *versions: int) -> Rollout:
        return Rollout(
            tokens=[0] * (tokens + 1),
            mask=[False] + [True] * tokens,
            logprobs=[0.0] * (tokens + 1),
            versions=[NOT_SAMPLED, *versions] if versions else [],
            completion="",
            reward=1.0,
            stop_reason=StopReason.LENGTH,
            sampling=Sampling(),
            version=version,
        )

    task = Task(id="t", prompt="p")
    fresh = RolloutGroup(task=task, rollouts=[rollout(2, 5), rollout(4, 5)])
    mixed = RolloutGroup(task=task, rollouts=[rollout(4, 3, 3, 3, 4, 5), rollout(2, 4)])
    assert staleness_metrics([fresh, mixed], 5) == {
        "staleness/mean": 1.0,
        "staleness/max": 2.0,
        # (2 + 2 + 1 + 0) of the mixed rollout and (1 + 1) of the rollout beside it.
        "staleness/token_mean": 7 / 12,
        "staleness/mixed_tokens": 4 / 12,
    }
    rows = sample_rows(0, [fresh, mixed], [[0.0, 0.0]] * 2)
    assert [row.get("versions") for row in rows] == [None, None, {"3": 2, "4": 1, "5": 1}, None]
