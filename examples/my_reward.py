"""Reward functions to copy from: each takes the prompt, the completion and the task's columns.

textpolicy train --env add --reward examples/my_reward.py:close --output runs/close
"""


def close(prompt, completion, example):
    """1 for the sum, less the further off, 0 for what is no number."""
    if not completion.strip().isdecimal():
        return 0.0
    return 1 / (1 + abs(int(completion) - example["sum"]))


def only_even_sums(prompt, completion, example):
    """None leaves a sample out: neither rewarded nor part of its group's baseline."""
    if example["sum"] % 2:
        return None
    return float(completion.strip() == str(example["sum"]))
