"""Every option of `textpolicy train`: a field of a section is a flag, a TOML key and a check.

Each default is set here. None leaves the value to the part of the library that uses the option, and
`unset` says in words what happens then. A default `ByModel` is that of a tiny model, and
`config/model_defaults.py` has those of larger models.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal

from textpolicy.config.option_types import Table
from textpolicy.config.settings import (
    FINITE,
    SEED,
    FloatByModel,
    IntByModel,
    above,
    at_least,
    check,
    option,
)
from textpolicy.errors import ConfigError

# The names of the files in the package's folder `algorithms`. Importing them would load mlx.
ALGORITHMS = tuple(
    module.name
    for module in iter_modules([str(Path(__file__).parents[1] / "algorithms")])
    if not module.ispkg
)
# Rounds in which algorithms with dynamic sampling replace groups without signal.
DYNAMIC_ROUNDS = 10

# Help texts, and defaults, of options that several commands have.
LR = "learning rate of Adam"
SCHEDULE = ("constant", "how the learning rate falls over the run")
WARMUP = (0, "updates at the start over which the learning rate rises")
FINAL_LR = (0.0, "learning rate at the end of a linear or cosine schedule")
WEIGHT_DECAY = (0.0, "weight decay of AdamW")
LIMITS = (
    "refuse",
    "what to do if the run needs more memory or disk space than the machine has, by an estimate",
)
STEP_DEADLINE = (
    None,
    "seconds after which a step is reported, with what the step waits for",
)
DEADLINE_UNSET = "ten times the median of the steps, after five steps"
STOP_ON_STALL = (
    False,
    "stop a run whose step is reported, with the exit code 75, so that it can be resumed",
)
DATA_HELP = (
    "{}: a .jsonl, .csv or .parquet file, a folder, or hf:OWNER/NAME[@REVISION][:CONFIG][:SPLIT]"
)
COLUMNS = (
    None,
    "other names of columns, such as prompt=question or gold=reward_model.ground_truth; a dot goes "
    "into a column",
)
COLUMNS_UNSET = "the names in the data"
PROMPT = (None, "template of the prompt with columns of --data in braces")
PROMPT_UNSET = "the column 'prompt'"
SYSTEM = "system message for conversations without one: a text, or a file that holds the text"
CHECKPOINT_GRADIENTS = (False, "recompute activations in the backward pass: less memory, more time")

Schedule = Literal["constant", "linear", "cosine"]
Bits = Literal[2, 3, 4, 5, 6, 8]


def _is_json(value: Any) -> bool:
    """Return whether JSON can hold the value."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_json(part) for name, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    if isinstance(value, float):
        return isfinite(value)
    return value is None or isinstance(value, str | int)


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The tasks to train on, and the reward."""

    env: str | None = option(
        None,
        "environment: a name that `textpolicy envs` lists, FILE.py[:NAME], or agent:FILE.py[:NAME]",
        unset="none; --data has the tasks",
        metavar="NAME",
    )
    data: str | None = option(
        None, DATA_HELP.format("rows of tasks"), unset="those of --env", metavar="FILE"
    )
    eval_data: str | None = option(
        None,
        "rows to measure on, all of them, in place of a part of --data; as for --data",
        unset="a tenth of the prompts of --data, by their hashes",
        metavar="FILE",
    )
    columns: Table | None = option(*COLUMNS, unset=COLUMNS_UNSET)
    data_stream: bool = option(
        False,
        "read --data while it is used, and shuffle by a buffer, for data of any size",
    )
    prompt: str | None = option(*PROMPT, unset=PROMPT_UNSET)
    system: str | None = option(None, SYSTEM, metavar="TEXT|FILE")
    few_shot: int = option(
        0,
        "training tasks with their right answers that the model reads before each prompt",
        metavar="N",
        limit=at_least(0),
    )
    gold_column: str | None = option(
        None,
        "column of right answers in --data, for --few-shot",
        unset="the first of gold, answer, solution, ... that exists",
        metavar="NAME",
    )
    reward: str | None = option(
        None,
        "your reward function, or a ready one that compares with the column answer, such as "
        "exact_match or math_equal; it replaces the reward of the environment",
        unset="the environment's",
        metavar="FILE.py[:NAME]",
    )
    reward_timeout: float | None = option(
        None,
        "seconds after which a reward call is killed; rewards then run in another process",
        unset="no limit",
        metavar="SECONDS",
        limit=above(0),
    )
    env_timeout: float | None = option(
        None,
        "seconds after which reset, step or close of an environment is killed; episodes then run "
        "in another process. For an agent, seconds of a whole rollout",
        unset="no limit; 300 for an agent",
        metavar="SECONDS",
        limit=above(0),
    )
    agent_processes: int | None = option(
        None,
        "rollouts that an agent plays at once, each in a process of its own",
        unset="4 for each CPU core, at most 16",
        metavar="N",
        limit=at_least(1),
    )
    tool_timeout: float | None = option(
        None,
        "seconds after which a call of a tool is killed; tools then run in another process",
        unset="no limit",
        metavar="SECONDS",
        limit=above(0),
    )
    on_reward_error: Literal["fail", "skip"] | float | None = option(
        None,
        "when a reward or an environment fails: fail ends the run, skip drops the sample, a number "
        "is its score",
        unset="fail",
        metavar="POLICY",
        limit=FINITE,
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The base model, which is not changed."""

    name: str = option(
        "tiny",
        "base model: 'tiny' (the embedded model), a folder, or a hub id",
        flag="--model",
        metavar="NAME",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "dtype of weights that are not quantized", unset="float32 on a CPU, else as stored"
    )
    quantize: Bits | None = option(
        None, "quantize the base to this many bits (QLoRA)", unset="no quantization"
    )
    quantize_mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4", "nf4"] | None = option(
        None, "number format of quantized weights, with --quantize", unset="affine"
    )
    quantize_group: int | None = option(
        None,
        "weights that share one scale, with --quantize",
        unset="the default of the format",
        limit=at_least(1),
    )

    allow_special_tokens: bool = option(
        False,
        "let prompts, replies and rows spell control tokens such as <|im_end|>; they are plain "
        "text otherwise",
    )
    thinking: Literal["on", "off"] | None = option(
        None,
        "whether the model thinks before it answers, by the switch of its chat template",
        unset="the default of the chat template, which the run tells",
    )
    chat_template_kwargs: Table | None = option(
        None,
        "arguments of the chat template, such as enable_thinking=false or reasoning_effort=low",
        unset="the defaults of the chat template",
        flag="--template-args",
    )
    threads: int | None = option(
        None,
        "CPU threads for matrix products",
        unset="all cores but one, or both of two; 1 for 'tiny', and in each process with --workers",
        limit=at_least(1),
    )

    def __post_init__(self) -> None:
        check(self)
        if self.quantize is None and (self.quantize_mode or self.quantize_group):
            raise ConfigError(
                "quantize_mode or quantize_group is given without quantize. Add quantize, for "
                "example --quantize 4"
            )
        if not _is_json(self.chat_template_kwargs):
            raise ConfigError(
                "chat_template_kwargs holds a value that JSON does not have, such as a date. "
                "Expected texts, finite numbers, true, false, lists and tables"
            )


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """The adapters to train."""

    start: Path | None = option(
        None,
        "adapters to continue training: a file, a run, a GGUF LoRA, or a folder of mlx-lm or PEFT",
        unset="fresh adapters",
        flag="--adapter",
    )
    config: Path | None = option(
        None,
        "JSON file of adapter options: rules, or a config of mlx-lm or PEFT",
        unset="the options below",
        flag="--adapter-config",
        metavar="FILE",
    )
    kind: Literal["lora", "dora"] | None = option(None, "type of adapter", unset="lora")
    rank: int | None = option(None, "rank of the low-rank product", unset="16", limit=at_least(1))
    scale: float | None = option(
        None,
        "factor of the low-rank product",
        unset="2; with a model that is not tiny, 32 / rank in `train`",
        limit=above(0),
    )
    alpha: float | None = option(
        None,
        "scale times rank, as in PEFT; instead of scale",
        unset="from the scale",
        limit=above(0),
    )
    num_layers: int | None = option(
        None, "number of last blocks to adapt", unset="all blocks", limit=at_least(1)
    )
    keys: tuple[str, ...] | None = option(
        None,
        "layers to adapt, by path inside a block, such as self_attn.q_proj,mlp.up_proj",
        unset="every linear layer",
        metavar="PATHS",
    )
    target_modules: tuple[str, ...] | None = option(
        None,
        "layers to adapt, by name as in PEFT, such as q_proj,v_proj; instead of keys",
        unset="every linear layer",
        metavar="NAMES",
    )
    dropout: float | None = option(
        None,
        "adapter dropout in supervised training; reinforcement learning needs 0",
        unset="0",
        limit=at_least(0),
    )

    def __post_init__(self) -> None:
        check(self)
        words = [name for name in FRESH_ADAPTER_FIELDS if getattr(self, name) is not None]
        if self.config and words:
            raise ConfigError(
                f"an adapter config is given together with {words}. Set these options in "
                f"{self.config} instead"
            )
        if self.target_modules and (self.keys or self.num_layers):
            raise ConfigError(
                "target_modules is given together with keys or num_layers. Both choose the layers "
                "to adapt; give one of them"
            )
        if self.start and (self.config or words):
            raise ConfigError(
                f"the adapters of {self.start} are given together with {words or ['config']}. "
                "Adapters from a file have their own config; leave out the other options"
            )


FRESH_ADAPTER_FIELDS = (
    "kind",
    "rank",
    "scale",
    "alpha",
    "num_layers",
    "keys",
    "target_modules",
    "dropout",
)
"""The fields of `AdapterOptions` that describe fresh adapters."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How completions are sampled in training."""

    max_tokens: int | None = option(
        None, "most tokens of a completion", unset="what the task needs", limit=at_least(1)
    )
    temperature: float = option(1.0, "sampling temperature", limit=above(0))
    merge_adapters: bool = option(
        False,
        "sample from a copy of the model whose float32 weights include the adapters, made anew "
        "for each version; the adapted weights take their memory once more. It saves the time of "
        "adapter layers, but gains nothing for bfloat16 checkpoints on a CPU, and is refused for "
        "weights that are not float32",
    )

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
    """Optimizer, updates and micro-batches."""

    lr: float = option(FloatByModel(5e-4), LR, limit=above(0))
    schedule: Schedule = option(*SCHEDULE)
    warmup: int = option(*WARMUP, limit=at_least(0))
    final_lr: float = option(*FINAL_LR, limit=at_least(0))
    weight_decay: float = option(*WEIGHT_DECAY, limit=at_least(0))
    max_grad_norm: float = option(
        1.0, "gradients are clipped to this norm; inf is no limit", limit=above(0, infinite=True)
    )
    mini_batches: int | None = option(
        None,
        "updates of each step; its tasks are divided among them",
        unset="the algorithm's, mostly 1",
        limit=at_least(1),
    )
    epochs: int | None = option(
        None,
        "passes through the rollouts of each step",
        unset="the algorithm's, mostly 1",
        limit=at_least(1),
    )
    micro_batch_size: int | None = option(
        None,
        "rollouts in memory at once in an update",
        unset="whole groups, as many as have --micro-batch-tokens",
        limit=at_least(1),
    )
    checkpoint_gradients: bool = option(*CHECKPOINT_GRADIENTS)

    def __post_init__(self) -> None:
        check(self)


def staleness_bound(max_staleness: int | None, steps_per_generation: int) -> int:
    """Return the bound, which is by default that of a run whose workers never run ahead.

    Raise `ConfigError` if the steps of one generation would exceed the bound.
    """
    least = steps_per_generation - 1
    if max_staleness is None:
        return least
    if max_staleness < least:
        raise ConfigError(
            f"max_staleness is {max_staleness} and steps_per_generation is {steps_per_generation}: "
            f"the last of these steps trains on groups that are {least} versions old. Set "
            f"max_staleness to at least {least}, or steps_per_generation to at most "
            f"{max_staleness + 1}"
        )
    return max_staleness


NO_RAY, LOCAL_RAY = "off", "local"


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """How many completions each step samples."""

    group_size: int = option(
        IntByModel(8), "completions of each task, whose rewards are compared", limit=at_least(2)
    )
    groups_per_step: int = option(IntByModel(16), "tasks of each step", limit=at_least(1))
    workers: int = option(
        0,
        "processes that sample beside the trainer, each with a copy of the base; 0 samples in the "
        "trainer's own process",
        metavar="N",
        limit=at_least(0),
    )
    ray: str = option(
        NO_RAY,
        "HOST:PORT of a Ray cluster whose machines hold the workers; 'local' starts Ray on this "
        "machine, and with 'off' the workers are processes without Ray",
        metavar="ADDRESS",
    )
    worker_deadline: float | None = option(
        None,
        "seconds after which a worker that still plays its job is ended; its tasks are played "
        "again one by one",
        unset="ten times the median of the jobs, and a minute at least",
        metavar="SECONDS",
        limit=above(0),
    )
    steps_per_generation: int = option(
        1, "steps that train on rollouts sampled at once", limit=at_least(1)
    )
    refill_rounds: int | None = option(
        None,
        "rounds of sampling that replace groups of equal rewards; 1 replaces none",
        unset=f"1, and {DYNAMIC_ROUNDS} with dapo",
        limit=at_least(1),
    )
    max_staleness: int | None = option(
        None,
        "most versions between the adapters that sample a group and those that train on it; so far "
        "workers may run ahead",
        unset="steps_per_generation - 1: no worker runs ahead",
        limit=at_least(0),
    )
    swap: Literal["completions", "tokens"] = option(
        "completions",
        "when workers that run ahead take new adapters: between completions, or between tokens, "
        "where each token carries the version that sampled it",
    )

    def __post_init__(self) -> None:
        check(self)
        staleness_bound(self.max_staleness, self.steps_per_generation)
        if self.ray != NO_RAY and not self.workers:
            raise ConfigError(
                f"ray is {self.ray!r} and workers is 0: no worker would use Ray. Set workers to at "
                f"least 1, or ray to {NO_RAY!r}"
            )

    @property
    def workers_here(self) -> int:
        """The workers that this machine holds; those of a Ray cluster may be on others."""
        return self.workers if self.ray in (NO_RAY, LOCAL_RAY) else 0

    @property
    def workers_run_ahead(self) -> bool:
        """Whether workers sample while the trainer trains."""
        bound = staleness_bound(self.max_staleness, self.steps_per_generation)
        return bool(self.workers) and bound >= self.steps_per_generation


OF_DEVICE = "chosen for this device"


@dataclass(frozen=True, kw_only=True)
class HeadSizeOptions:
    """Sizes of the work that the device gets at once."""

    head_chunk_bytes: int | None = option(
        None,
        "bytes of the float32 logits that are computed at once in training",
        unset=OF_DEVICE,
        metavar="N",
        limit=at_least(1),
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class SizeOptions(HeadSizeOptions):
    """Sizes of the work that the device gets at once."""

    micro_batch_tokens: int | None = option(
        None,
        "tokens of a micro-batch, with their padding, unless --micro-batch-size is given",
        unset=OF_DEVICE,
        metavar="N",
        limit=at_least(1),
    )
    decoding_rows: int | None = option(
        None,
        "completions that are sampled together",
        unset=OF_DEVICE,
        metavar="N",
        limit=at_least(1),
    )
    prefill_tokens: int | None = option(
        None,
        "prompt tokens, of all rows together, that one forward pass reads",
        unset=OF_DEVICE,
        metavar="N",
        limit=at_least(1),
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How the policy is measured on held-out tasks."""

    count: int = option(IntByModel(512), "number of held-out tasks", limit=at_least(2))
    every: int | None = option(
        None,
        "steps between two evaluations; the best adapter is then the best evaluated one",
        unset="by the model; before and after the run only, for a tiny one",
        flag="--eval-every",
        limit=at_least(1),
    )
    samples: int = option(
        0,
        "sampled completions of each task, for pass@k and avg@k",
        flag="--eval-samples",
        limit=at_least(0),
    )
    temperature: float = option(
        1.0, "temperature of --eval-samples", flag="--eval-temperature", limit=above(0)
    )
    good: float = option(
        0.5, "lowest reward that counts as right, for pass@k", flag="--eval-good", limit=FINITE
    )
    envs: tuple[str, ...] | None = option(
        None,
        "other environments to evaluate on, separated by commas",
        unset="none",
        flag="--eval-envs",
        metavar="NAMES",
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class TrackingOptions:
    """Services that get the metrics, beside the files of the run."""

    wandb: bool | str | None = option(
        None,
        "log to this project of Weights & Biases, or to the project textpolicy without a name; "
        "offline without an API key",
        unset="no",
        metavar="PROJECT",
    )
    tensorboard: bool = option(
        False, "log to TensorBoard event files in the folder tensorboard of the run"
    )
    trackio: bool | str | None = option(
        None,
        "log to this project of trackio, or to the project textpolicy without a name",
        unset="no",
        metavar="PROJECT",
    )
    wandb_artifacts: bool = option(
        False, "upload the latest and the best adapter to Weights & Biases at the end"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.wandb_artifacts and not self.wandb:
            raise ConfigError(
                "wandb_artifacts is given without a project of Weights & Biases. Name one, for "
                "example --wandb PROJECT"
            )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Length, seed, output folder and checkpoints of the run."""

    output: Path | None = option(
        None,
        "folder for the adapters, config and metrics",
        unset="a new folder in runs",
        metavar="DIR",
    )
    steps: int = option(
        IntByModel(200), "number of steps: sample, score, update", limit=at_least(1)
    )
    seed: int = option(0, "seed of all random numbers; the same seed repeats the run", limit=SEED)
    checkpoint_every: int = option(1, "steps between two checkpoints", limit=at_least(1))
    keep_checkpoints: int = option(2, "number of checkpoints to keep", limit=at_least(1))
    keep_adapters: int = option(
        5, "evaluated versions of the adapter to keep, beside the best", limit=at_least(1)
    )
    sample_groups: int | None = option(
        None,
        "groups of each step to write to samples.jsonl; 0 writes none",
        unset="all",
        limit=at_least(0),
    )
    stop_on_collapse: bool = option(
        False, "stop the run at the first alarm about learning and keep the best adapter"
    )
    step_deadline: float | None = option(
        *STEP_DEADLINE, unset=DEADLINE_UNSET, metavar="SECONDS", limit=above(0)
    )
    stop_on_stall: bool = option(*STOP_ON_STALL)
    limits: Literal["refuse", "warn"] = option(*LIMITS)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of reinforcement learning."""

    task: TaskOptions = field(default_factory=TaskOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    algorithm: AlgorithmOptions = field(default_factory=AlgorithmOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    sizes: SizeOptions = field(default_factory=SizeOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    run: RunOptions = field(default_factory=RunOptions)


DEMO = TrainConfig(task=TaskOptions(env="add"), run=RunOptions(steps=400))
