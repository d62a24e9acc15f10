"""Reward functions to copy from. docs/rewards.md lists the parameters that a reward can have.

textpolicy train --env add --reward examples/my_reward.py:close --output runs/close
"""

import textpolicy as tp


def close(completion, example):
    """Return 1 for the sum, less for a more distant number, and 0 for other text."""
    if not completion.strip().isdecimal():
        return 0.0
    return 1 / (1 + abs(int(completion) - example["sum"]))


def only_even_sums(completion, example):
    """Return None to leave a sample out: it is not trained on, nor part of its group's baseline."""
    if example["sum"] % 2:
        return None
    return float(completion.strip() == str(example["sum"]))


def brief(completion, tokens):
    """Return a `Score` to report metrics beside the reward."""
    return tp.Score(1 / (1 + len(tokens)), {"characters": len(completion)})


@tp.reward(batched=True)
def unlike_the_others(completions):
    """Take all samples in one call, because of `batched`."""
    return [1 / completions.count(completion) for completion in completions]


both = tp.Rewards([close, brief], weights=[1.0, 0.1])
