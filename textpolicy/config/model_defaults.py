"""The defaults that depend on the model, and where they come from.

`textpolicy train` chooses these settings by the size of the model, wherever you set none. What you
set always wins, `--dry-run` shows what is chosen, and a resumed run keeps the numbers of its
`config.toml`.

- **Rate.** LoRA needs about ten times the rate of full training, at any rank, and less in a wider
  model. The rule is 3e-4 x (576 / width) ^ 0.781, by the table below. Adam's steps do not depend on
  the scale of a loss, so the rate is the same for every algorithm, for LoRA and DoRA, and over a
  quantized base.
- **Rank and scale.** Rank 16 on every linear layer, and a scale of 32 / rank. With this scale the
  best rate hardly depends on the rank, by the publications, so `--rank 1` needs no other rate.
- **Groups.** 8 tasks with 8 completions each make a step. DPO takes 32 tasks with a pair each.
- **Steps and measurements.** 60 steps, measured on 256 held-out tasks before, after 30 steps and
  at the end; longer runs are measured after every quarter. 256 tasks give a standard error of 0.03
  or less, so a gain of a tenth is seen. The best adapter is the best one of those measurements.
- **Lengths.** Environments say how long an answer may be. Rows of your own have up to 256 tokens.

Published rates for LoRA on all linear layers:

| source | model | rate |
|---|---|---|
| Thinking Machines, LoRA Without Regret | all | ten times that of full training, at any rank |
| tinker-cookbook, `hyperparam_utils` | Llama | 5e-4 x (2000 / width) ^ 0.781, for demonstrations |
| tinker-cookbook, recipes for RL | 8B and 9B | 4e-5 to 1e-4 |
| TRL, its page on LoRA Without Regret | SmolLM3-3B | 1e-5, and 1e-6 for all weights |
| verl, example for GRPO, scale 0.5 | Qwen2.5-3B | 3e-6 |

Measured here with SmolLM2-135M-Instruct, whose width is 576 (`benchmarks/rates.py`): in 14 steps on
`benchmarks/opposites.py` the sampled reward rises from 0.14 to 0.31 at 1e-4, from 0.23 to 0.68 at
3e-4 and from 0.48 to 0.80 at 1e-3. On `number_words` it rises from 0.44 to 0.78 at 3e-4, and swings
between 0 and 1 at 1e-3. Wider models were not measured; for them the rule stays within the
published rates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

TINY_WEIGHTS = 20_000_000
"""Models with fewer weights keep the defaults of the config, which were measured on such models."""
ALPHA = 32.0
"""Scale times rank. With this product, one rate fits every rank."""
_RATE, _WIDTH, _POWER = 3e-4, 576, 0.781
_STEPS, _EVERY = 60, 30


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What a config.json says about the size of a model."""

    width: int
    """Numbers in a token's hidden state."""
    weights: int

    @property
    def is_tiny(self) -> bool:
        """Return whether the model is one to test with, such as the embedded model."""
        return self.weights < TINY_WEIGHTS


def learning_rate(width: int) -> float:
    """Return the rate of Adam for a model of this width, with two digits."""
    return float(f"{_RATE * (_WIDTH / width) ** _POWER:.1e}")


def defaults_of(
    size: ModelSize, *, algorithm: str = "grpo", rank: int = 16, steps: int = _STEPS
) -> Mapping[str, Any]:
    """Return the settings that the size of a model decides, by key; of a tiny model, none.

    `algorithm`, `rank` and `steps` are what the user has set.
    """
    if size.is_tiny:
        return {}
    group = 2 if algorithm == "dpo" else 8
    return {
        "trainer.lr": learning_rate(size.width),
        "adapter.rank": rank,
        "adapter.scale": ALPHA / rank,
        "rollout.group_size": group,
        "rollout.groups_per_step": 64 // group,
        "run.steps": steps,
        "evaluation.count": 256,
        "evaluation.every": max(_EVERY, ceil(steps / 4)),
    }
