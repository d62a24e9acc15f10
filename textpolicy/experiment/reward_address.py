"""Finds the file and the name of a reward that `tp.run` was given as an object.

A run loads its reward from a file, so that the run can be resumed and other processes can load the
reward too.
"""

import inspect
import sys
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.rewards import Rewards, as_rewards


def with_reward_address(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the sections with "FILE.py:NAME" in place of a reward that is an object."""
    task: Any = config.get("task")
    reward: Any = task.get("reward") if isinstance(task, Mapping) else None
    if isinstance(reward, list | tuple):
        raise ConfigError(
            "task.reward is a list; expected one reward. Several rewards are one tp.Rewards in a "
            "file: write rewards = tp.Rewards([one, other], weights=[1.0, 0.5]) into rewards.py, "
            'and "reward": "rewards.py:rewards" into the config'
        )
    if not (callable(reward) or isinstance(reward, Rewards)):
        return config
    return {**config, "task": {**task, "reward": _address_of(reward)}}


def _address_of(reward: Any) -> str:
    """Return where an imported file holds this reward; raise ConfigError if none does."""
    member = as_rewards(reward).members[0]
    function = member.function
    is_function = isinstance(function, FunctionType)
    own = sys.modules.get(function.__module__ if is_function else type(function).__module__)
    loaded = [one for one in list(sys.modules.values()) if inspect.ismodule(one)]
    for module in [own, *loaded] if own else loaded:
        names = vars(module)
        file = str(names.get("__file__"))
        # A script would begin anew where it is loaded as the file of a reward.
        if file.endswith(".py") and names.get("__name__") != "__main__":
            found = [name for name, value in list(names.items()) if value is reward]
            if found:
                return f"{file}:{found[0]}"
    what = "a tp.Rewards" if isinstance(reward, Rewards) else f"the function {member.name}"
    raise ConfigError(
        f"task.reward is {what} that no imported file holds. A run loads its reward from a file of "
        "its own, so that the run can be resumed and other processes can load the reward. Move the "
        'reward into a file such as rewards.py, and write "reward": "rewards.py:NAME" into the '
        "config, or import the reward from that file"
    )
