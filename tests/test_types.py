import pytest

from textpolicy.errors import ConfigError
from textpolicy.types import (
    Progress,
    Rollout,
    RolloutGroup,
    Sampling,
    StopReason,
    Task,
    asks_to_stop,
)


def rollout(**changes) -> Rollout:
    fields = {
        "tokens": [1, 2, 3],
        "mask": [False, True, True],
        "logprobs": [0.0, -0.5, -0.25],
        "completion": "x",
        "reward": 1.0,
        "stop_reason": StopReason.STOP_TOKEN,
        "sampling": Sampling(),
        "version": 0,
    }
    return Rollout(**(fields | changes))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("stop", ("",)),
    ],
)
def test_the_error_for_a_sampling_option_names_the_option(option, value):
    with pytest.raises(ConfigError, match=option):
        Sampling(**{option: value})


def test_only_samples_of_the_full_distribution_are_usable_for_training():
    assert Sampling(temperature=0.7).usable_for_training
    for off_policy in ({"temperature": 0}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}):
        assert not Sampling(**off_policy).usable_for_training
    assert not Sampling(repetition_penalty=1.1).usable_for_training


def test_a_rollout_refuses_lists_of_unequal_length():
    with pytest.raises(ValueError, match="equal length; got 3, 2, 3"):
        rollout(mask=[False, True])


def test_the_version_of_a_group_is_that_of_its_oldest_rollout():
    group = RolloutGroup(
        task=Task(id="t", prompt="p"), rollouts=[rollout(version=4), rollout(version=2)]
    )
    assert group.version == 2


def test_a_callback_may_return_stop_or_more_or_what_a_false_condition_gives():
    answers = (Progress.STOP, Progress.MORE, None, False)
    assert [asks_to_stop(answer, "on_step") for answer in answers] == [True, False, False, False]
    for answer in (True, 0, "", 3):
        message = f"the callback on_step returned {answer!r}; return Progress.STOP"
        with pytest.raises(ConfigError, match=message):
            asks_to_stop(answer, "on_step")
