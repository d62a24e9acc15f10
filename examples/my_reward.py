"""Reward functions to copy from. What they need they ask for by name: docs/rewards.md has the list.

textpolicy train --env add --reward examples/my_reward.py:close --output runs/close
"""

import textpolicy as tp


def close(completion, example):
    """1 for the sum, less the further off, 0 for what is no number."""
    if not completion.strip().isdecimal():
        return 0.0
    return 1 / (1 + abs(int(completion) - example["sum"]))


def only_even_sums(completion, example):
    """None leaves a sample out: neither rewarded nor part of its group's baseline."""
    if example["sum"] % 2:
        return None
    return float(completion.strip() == str(example["sum"]))


def brief(completion, tokens):
    """A `Score` reports numbers beside the reward."""
    return tp.Score(1 / (1 + len(tokens)), {"characters": len(completion)})


@tp.reward(batched=True)
def unlike_the_others(completions):
    """With `batched`, one call for all samples."""
    return [1 / completions.count(completion) for completion in completions]


both = tp.Rewards([close, brief], weights=[1.0, 0.1])
