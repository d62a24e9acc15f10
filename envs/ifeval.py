"""Follow instructions that a program can check, from rows in the form of IFEval.

`--data` takes rows with `prompt`, `instruction_id_list` and `kwargs`. Without it the 541 published
prompts are downloaded. The reward is 1 if all instructions of a prompt are followed.
"""

from collections.abc import Mapping
from typing import Any

from textpolicy import rewards
from textpolicy.rewards.verifiers.instructions.following import (
    check_instructions,
    instructions_followed,
)

DATA = "hf:google/IFEval"
MAX_TOKENS = 1024


def PROMPT(example: Mapping[str, Any]) -> str:
    check_instructions(example.get("instruction_id_list"), example.get("kwargs"))
    return example["prompt"]


# Metrics have this name.
@rewards.reward(name="ifeval")
def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> rewards.Score:
    ids, arguments = example["instruction_id_list"], example["kwargs"]
    found = instructions_followed(visible_answer, ids, arguments)
    # Accuracy over instructions is the mean of the followed ones divided by the mean number.
    metrics = {
        "prompt_strict": float(all(found.strict)),
        "prompt_loose": float(all(found.loose)),
        "followed_strict": sum(found.strict),
        "followed_loose": sum(found.loose),
        "instructions": len(ids),
    }
    return rewards.Score(metrics["prompt_strict"], metrics)
