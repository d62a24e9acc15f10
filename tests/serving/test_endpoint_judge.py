"""A judge behind an endpoint asks this server, and an adapter grades by its name."""

import pytest

from tests.serving.conftest import TOKEN
from textpolicy.errors import ConfigError
from textpolicy.rewards.endpoint import Endpoint
from textpolicy.rewards.judge import judge

QUESTIONS = ["12+30=", "sort: 3 1 2", "reverse: abc"]


@pytest.fixture
def endpoint(live, monkeypatch):
    """Return a function that makes an endpoint of the live server."""
    monkeypatch.setenv("JUDGE_KEY", TOKEN)

    def make(model, key_from="JUDGE_KEY"):
        return Endpoint(
            url=f"{live.address}/v1", model=model, key_from=key_from, max_tokens=8, retries=0
        )

    return make


@pytest.mark.parametrize("name", ["tiny", "red", "blue"])
def test_a_served_model_answers_a_judge_as_its_policy_does(name, live, endpoint, policy_of):
    (replies,) = live.run(lambda: endpoint(name)(QUESTIONS))
    policy = policy_of(name, max_tokens=8, temperature=0)
    expected = [completion for (completion,) in policy.generate(QUESTIONS)]
    assert [reply.text for reply in replies] == [completion.text for completion in expected]
    assert [reply.completion_tokens for reply in replies] == [len(one.tokens) for one in expected]


def test_a_reward_asks_the_adapter_that_the_endpoint_names(live, endpoint, policy_of):
    reward = judge(endpoint("red"), "10 for a short answer", name="red")
    (scores,) = live.run(lambda: reward.function(["ask me"], ["yes"]))
    question = reward.function.question("ask me", "yes")
    ((said,),) = policy_of("red", max_tokens=8, temperature=0).generate([question])
    assert scores[0].metrics["completion_tokens"] == len(said.tokens)


def test_a_wrong_token_and_an_unknown_adapter_end_the_run_with_what_to_check(live, endpoint):
    for model, key_from, status in (("red", "NO_SUCH_KEY", 401), ("green", "JUDGE_KEY", 404)):
        with pytest.raises(ConfigError, match=f"status {status}.*the model's name and the key"):
            live.run(lambda model=model, key=key_from: endpoint(model, key)(["ask me"]))
