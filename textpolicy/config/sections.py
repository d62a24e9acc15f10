"""The sections of a training run, each with its options. A default is said here and nowhere else.

Where a value is None, the part of the library that takes it decides; `unset` tells people how.
"""

from dataclasses import dataclass
from pathlib import Path
from pkgutil import iter_modules
from typing import Literal

from textpolicy.config.option_types import Table
from textpolicy.config.settings import FINITE, SEED, above, at_least, check, option
from textpolicy.errors import ConfigError

# Every file of the package's folder `algorithms` is one. Importing them would load mlx.
ALGORITHMS = tuple(
    module.name
    for module in iter_modules([str(Path(__file__).parents[1] / "algorithms")])
    if not module.ispkg
)
# Algorithms with dynamic sampling replace groups without signal in so many rounds.
DYNAMIC_ROUNDS = 10

# What several commands say of an option, with its default where they share that too.
LR = "learning rate of Adam"
SCHEDULE = ("constant", "how the learning rate falls by the end, if it does")
WARMUP = (0, "updates over which the learning rate rises at the start")
FINAL_LR = (0.0, "learning rate at the end of a falling schedule")
WEIGHT_DECAY = (0.0, "share of each weight, times the learning rate, that an update takes off")
CHECKPOINT_GRADIENTS = (
    False,
    "compute activations again in the backward pass: less memory, more time",
)

Schedule = Literal["constant", "linear", "cosine"]
Bits = Literal[2, 3, 4, 5, 6, 8]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What is trained on, and what scores it."""

    env: str | None = option(
        None,
        "a name that `textpolicy envs` lists, or FILE.py[:NAME]",
        unset="--data's rows alone",
        metavar="NAME",
    )
    data: str | None = option(
        None,
        "rows: a .jsonl, .csv or .parquet file, a saved dataset, hf:NAME",
        unset="--env's",
        metavar="FILE",
    )
    prompt: str | None = option(
        None, "template of the prompt over the columns of --data", unset="the column 'prompt'"
    )
    reward: str | None = option(
        None,
        "your reward function, in place of the environment's own",
        unset="the environment's",
        metavar="FILE.py[:NAME]",
    )
    reward_timeout: float | None = option(
        None,
        "seconds after which a reward is killed, in a process of its own",
        unset="no limit",
        metavar="SECONDS",
        limit=above(0),
    )
    on_reward_error: Literal["fail", "skip"] | float | None = option(
        None,
        "when a reward fails: fail, skip the sample, or a number to score it",
        unset="fail",
        metavar="POLICY",
        limit=FINITE,
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The language model under the adapters, which stays as it is."""

    name: str = option(
        "tiny", "'tiny' (the embedded model), a folder, or a hub id", flag="--model", metavar="NAME"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "of weights that are not quantized", unset="float32 on a CPU, else as stored"
    )
    quantize: Bits | None = option(None, "bits to quantize the weights to, QLoRA", unset="no")
    quantize_mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4", "nf4"] | None = option(
        None, "number format of quantized weights, beside --quantize", unset="affine"
    )
    quantize_group: int | None = option(
        None,
        "weights that share a scale, beside --quantize",
        unset="what the format has",
        limit=at_least(1),
    )

    threads: int | None = option(
        None,
        "CPU threads of matrix products",
        unset="all cores; 1 for 'tiny'",
        limit=at_least(1),
    )

    def __post_init__(self) -> None:
        check(self)
        if self.quantize is None and (self.quantize_mode or self.quantize_group):
            raise ConfigError(
                "quantize_mode and quantize_group say how to quantize, and nothing is quantized; "
                "add quantize, such as --quantize 4"
            )


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What is trained."""

    start: Path | None = option(
        None,
        "adapters to go on training: a file, or a folder of mlx-lm or PEFT",
        unset="fresh ones",
        flag="--adapter",
    )
    config: Path | None = option(
        None,
        "JSON of adapter options: rules, or those of mlx-lm or PEFT; not beside those below",
        unset="the options below",
        flag="--adapter-config",
        metavar="FILE",
    )
    kind: Literal["lora", "dora"] | None = option(None, "what stands beside a layer", unset="lora")
    rank: int | None = option(None, "rank of the low-rank product", unset="16", limit=at_least(1))
    scale: float | None = option(
        None, "what multiplies the low-rank product", unset="2", limit=above(0)
    )
    alpha: float | None = option(
        None,
        "rank times the scale, as PEFT gives it; not beside scale",
        unset="by the scale",
        limit=above(0),
    )
    num_layers: int | None = option(
        None, "adapt this many blocks from the end", unset="all", limit=at_least(1)
    )
    keys: tuple[str, ...] | None = option(
        None,
        "paths of layers inside a block, such as self_attn.q_proj,mlp.up_proj",
        unset="every linear layer",
        metavar="PATHS",
    )
    target_modules: tuple[str, ...] | None = option(
        None,
        "names of layers as PEFT has them, such as q_proj,v_proj; not beside keys",
        unset="every linear layer",
        metavar="NAMES",
    )
    dropout: float | None = option(
        None,
        "share of inputs that is left out in supervised training; 0 in reinforcement learning",
        unset="0",
        limit=at_least(0),
    )

    def __post_init__(self) -> None:
        check(self)
        words = [name for name in WORDS if getattr(self, name) is not None]
        if self.config and words:
            raise ConfigError(
                f"an adapter config is given beside {words}; put them in {self.config}"
            )
        if self.target_modules and (self.keys or self.num_layers):
            raise ConfigError(
                "target_modules is given beside keys or num_layers; each says what to adapt, and "
                "expected is one of them"
            )
        if self.start and (self.config or words):
            raise ConfigError(
                f"adapters to go on training are given beside {words or ['config']}; those of "
                f"{self.start} bring their own config"
            )


WORDS = (
    "kind",
    "rank",
    "scale",
    "alpha",
    "num_layers",
    "keys",
    "target_modules",
    "dropout",
)
"""The fields of `AdapterOptions` that say what fresh adapters are like."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How completions are drawn while training."""

    max_tokens: int | None = option(
        None, "longest completion", unset="what the task needs", limit=at_least(1)
    )
    temperature: float = option(1.0, "randomness of the sampled completions", limit=above(0))

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class AlgorithmOptions:
    """The objective to maximise."""

    name: str = option(
        "grpo",
        f"one of {', '.join(ALGORITHMS)}, or your own FILE.py[:FUNCTION]",
        flag="--algorithm",
        metavar="NAME",
    )
    options: Table | None = option(
        None,
        "options of this algorithm, such as '{clip_high = 0.28}'",
        unset="the paper's",
        flag="--algorithm-options",
    )
    average: str | None = option(
        None,
        "how the losses of tokens become one loss: sequence_mean, sequence_sum, token_mean, "
        "length_limit, constant(tokens=N) or micro_batch_token_mean",
        unset="the algorithm's",
        metavar="NAME",
    )
    ratio_level: str | None = option(
        None,
        "what an importance ratio is of: token, sequence (mean of its tokens' log-ratios) or "
        "whole_sequence (sum)",
        unset="the algorithm's",
        metavar="NAME",
    )
    kl: str | None = option(
        None,
        "estimator of the KL divergence in the loss, beside --beta: k1, k2, k3 or unbiased_k3",
        unset="k3",
        metavar="NAME",
    )
    weights: tuple[str, ...] | None = option(
        None,
        "factors on the losses of tokens: truncate_tokens, truncate_sequences, mask_tokens, "
        "mask_sequences, off_policy_mask, top_entropy_tokens; with numbers: mask_tokens(high=3)",
        metavar="NAMES",
    )
    beta: float = option(
        0.0,
        "weight of the KL divergence from the reference in the loss; 0 is none",
        limit=at_least(0),
    )
    reward_kl: float | None = option(
        None,
        "amount subtracted from a reward for each nat of KL divergence from the reference",
        unset="the algorithm's, mostly 0",
        limit=at_least(0),
    )
    reference: str | None = option(
        None,
        "reference policy of the KL terms: 'base', the model without adapters, or another model",
        unset="base, where one is needed",
        metavar="NAME",
    )
    old_logprobs: Literal["recorded", "fresh"] | None = option(
        None,
        "old log-probabilities of the ratios: recorded by the sampler, or computed fresh by the "
        "trainer",
        unset="recorded",
    )
    truncated: Literal["keep", "mask"] | None = option(
        None, "whether the loss keeps or masks completions cut off at the limit", unset="keep"
    )
    overlong_cache: int | None = option(
        None,
        "number of tokens before the length limit over which a penalty rises to 1",
        unset="no penalty",
        limit=at_least(1),
    )

    def __post_init__(self) -> None:
        check(self)
        if self.kl and not self.beta and "beta" not in (self.options or {}):
            raise ConfigError(
                f"kl is {self.kl!r} and beta is 0, so the loss has no KL term; set beta as well, "
                "such as --beta 0.04"
            )


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """How the weights move."""

    lr: float = option(5e-4, LR, limit=above(0))
    schedule: Schedule = option(*SCHEDULE)
    warmup: int = option(*WARMUP, limit=at_least(0))
    final_lr: float = option(*FINAL_LR, limit=at_least(0))
    weight_decay: float = option(*WEIGHT_DECAY, limit=at_least(0))
    max_grad_norm: float = option(
        1.0,
        "norm that longer gradients are shortened to; inf is no limit",
        limit=above(0, infinite=True),
    )
    mini_batches: int | None = option(
        None,
        "updates that a step's tasks are dealt to",
        unset="the algorithm's, mostly 1",
        limit=at_least(1),
    )
    epochs: int | None = option(
        None,
        "times that a step goes through its rollouts",
        unset="the algorithm's, mostly 1",
        limit=at_least(1),
    )
    micro_batch_size: int | None = option(
        None,
        "rollouts in memory at once while training",
        unset="whole groups, as many as have 1024 tokens",
        limit=at_least(1),
    )
    checkpoint_gradients: bool = option(*CHECKPOINT_GRADIENTS)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """What is sampled in each step."""

    group_size: int = option(
        8, "completions of each task, compared with each other", limit=at_least(2)
    )
    groups_per_step: int = option(16, "tasks in each step", limit=at_least(1))
    steps_per_generation: int = option(
        1, "steps whose rollouts are sampled at once", limit=at_least(1)
    )
    refill_rounds: int | None = option(
        None,
        "rounds of sampling in which groups without signal are replaced; 1 is no replacement",
        unset=f"1, and {DYNAMIC_ROUNDS} with dapo",
        limit=at_least(1),
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is measured on held-out tasks."""

    count: int = option(512, "held-out tasks to measure on", limit=at_least(2))
    every: int | None = option(
        None,
        "steps from one evaluation to the next; the best adapter is then the best evaluated",
        unset="only before and after the run",
        flag="--eval-every",
        limit=at_least(1),
    )
    samples: int = option(
        0,
        "completions of each task beside the greedy one, for pass@k and avg@k",
        flag="--eval-samples",
        limit=at_least(0),
    )
    temperature: float = option(
        1.0, "randomness of those completions", flag="--eval-temperature", limit=above(0)
    )
    good: float = option(
        0.5,
        "reward from which on a completion counts as right, for pass@k",
        flag="--eval-good",
        limit=FINITE,
    )
    envs: tuple[str, ...] | None = option(
        None,
        "other environments to evaluate on too, with commas between",
        unset="none",
        flag="--eval-envs",
        metavar="NAMES",
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class TrackingOptions:
    """Where the numbers go, beside the files of the run."""

    wandb: str | None = option(
        None,
        "log to this project of Weights & Biases too; offline without an API key",
        unset="no",
        metavar="PROJECT",
    )
    tensorboard: bool = option(
        False, "log to event files of TensorBoard too, in the folder tensorboard of the run"
    )
    trackio: str | None = option(
        None, "log to this project of trackio too", unset="no", metavar="PROJECT"
    )
    wandb_artifacts: bool = option(
        False, "upload the latest and the best adapter to Weights & Biases at the end"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.wandb_artifacts and self.wandb is None:
            raise ConfigError(
                "wandb_artifacts uploads adapters to Weights & Biases, and nothing is logged "
                "there; name a project, wandb"
            )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How long it goes, from which seed, and where it is kept."""

    output: Path | None = option(
        None,
        "folder for the adapters, config and metrics",
        unset="a new one in runs",
        metavar="DIR",
    )
    steps: int = option(200, "rounds of sampling and training", limit=at_least(1))
    seed: int = option(0, "makes the run repeatable", limit=SEED)
    checkpoint_every: int = option(1, "steps from one checkpoint to the next", limit=at_least(1))
    keep_checkpoints: int = option(2, "checkpoints that are kept", limit=at_least(1))
    sample_groups: int | None = option(
        None,
        "groups of each step whose completions are kept in samples.jsonl; 0 is none",
        unset="all",
        limit=at_least(0),
    )
    stop_on_collapse: bool = option(
        False, "end the run at the first alarm, and keep the best adapter"
    )

    def __post_init__(self) -> None:
        check(self)
