"""The parts of a run, each made from its section of the config.

`assemble` shows how a model, its adapters, a policy and a trainer fit together in reinforcement
learning; `textpolicy.loop` runs them. What a config says is read here and nowhere else.
"""

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy import algorithms
from textpolicy.activity import doing
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.container import AdapterContainer, shared_copy
from textpolicy.adapters.quantization.quantize import quantize
from textpolicy.algorithms import Algorithm
from textpolicy.algorithms.parts.overlong import with_penalty
from textpolicy.config import DYNAMIC_ROUNDS, SFTConfig, TrainConfig, settings_of
from textpolicy.config.sft import SFTTrainerOptions
from textpolicy.config.train import (
    FRESH_ADAPTER_FIELDS,
    AdapterOptions,
    AlgorithmOptions,
    ModelOptions,
    TrainerOptions,
)
from textpolicy.environments import Environment
from textpolicy.environments.preamble import read_system
from textpolicy.environments.right_answers import right_answer_reader
from textpolicy.errors import ConfigError, UnreadableError
from textpolicy.evaluation import Evaluator, HeldOut
from textpolicy.experiment.tasks import find_task, with_environment
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.generation.thinking import template_arguments
from textpolicy.ranks import ALONE, Ranks
from textpolicy.rewards import Incident, Rewards, Scorer
from textpolicy.runs import RunDirectory
from textpolicy.tracking.open_tracker import ServiceOptions, open_tracker
from textpolicy.tracking.tracker import Tracker
from textpolicy.training.advantages import requested_keywords
from textpolicy.training.checkpoint import Checkpoints
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.sft import Encoding, SFTData, SFTParameters, iterations_of, load_data
from textpolicy.training.trainer import Trainer
from textpolicy.types import AdvantageFn, Sampling
from textpolicy.untrusted.parsing import read_json_object

RunConfig = TrainConfig | SFTConfig
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_SFT_ITERATIONS = 1000

# Settings that are options of the loss.
_LOSS_SETTINGS = ("average", "ratio_level", "kl", "weights", "beta")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The parts of a run of reinforcement learning, ready for `train_rl`."""

    environment: Environment
    adapters: AdapterContainer
    reward: Rewards
    policy: ModelPolicy
    trainer: Trainer
    refill_rounds: int


def find_algorithm(options: AlgorithmOptions) -> Algorithm:
    """Return the algorithm that the options name, with the algorithm's own options bound."""
    settings = {name: vars(options)[name] for name in _LOSS_SETTINGS}
    given = {name: value for name, value in settings.items() if value}
    return algorithms.get(options.name, **{**(options.options or {}), **given})


def assemble(
    config: TrainConfig,
    environment: Environment,
    reward: Rewards,
    algorithm: Algorithm,
    directory: RunDirectory,
    ranks: Ranks = ALONE,
) -> Experiment:
    """Load the model and build trainer and policy on two copies of it that share the base arrays.

    The trainer publishes its adapters as the latest ones of `directory`.
    """
    sampling = sampling_of(config, environment)
    model, tokenizer, adapters = load_adapted_model(config)
    adapters.publish_path = directory.latest
    dynamic = DYNAMIC_ROUNDS if algorithm.declaration.dynamic_sampling else 1
    return Experiment(
        environment=environment,
        adapters=adapters,
        reward=reward,
        policy=build_policy(shared_copy(model), tokenizer, config, sampling),
        trainer=build_trainer(
            model, config, algorithm, sampling.max_tokens, directory.rejected_batches, ranks
        ),
        refill_rounds=config.rollout.refill_rounds or dynamic,
    )


def load_adapted_model(
    config: TrainConfig,
) -> tuple[nn.Module, TokenizerWrapper, AdapterContainer]:
    """Load the base, quantized as the config says, and put the adapters on it that a run begins."""
    model, tokenizer = load_model(config.model.name, dtype=dtype_of(config.model))
    # Sampler and trainer must compute the same network, so adapters of a warm start lose dropout.
    adapters = adapt(model, config.adapter, config.model, config.run.seed, dropout_of_start=0.0)
    return model, tokenizer, adapters


def load_sampled_model(config: TrainConfig) -> tuple[nn.Module, TokenizerWrapper]:
    """Load the base with the adapters that the config starts from, to sample without training.

    Without adapters, the base is quantized as the config says.
    """
    start = config.adapter.start
    model, tokenizer = load_model(config.model.name, start, dtype=dtype_of(config.model))
    if start is None and (quantization := quantization_of(config.model)):
        quantize(model, **quantization)
    return model, tokenizer


def build_policy(
    model: nn.Module, tokenizer: TokenizerWrapper, config: TrainConfig, sampling: Sampling
) -> ModelPolicy:
    """Return the policy that samples from the model as the config says."""
    return ModelPolicy(
        model,
        tokenizer,
        sampling,
        swap=config.rollout.swap,
        merge_adapters=config.sampling.merge_adapters,
        seed=config.run.seed,
        allow_special_tokens=config.model.allow_special_tokens,
        chat_template_kwargs=template_arguments_of(config.model, tokenizer),
    )


def sampling_of(config: TrainConfig, environment: Environment) -> Sampling:
    """Return how completions are sampled; the environment knows how long its answers are."""
    return Sampling(
        max_tokens=config.sampling.max_tokens or environment.max_tokens,
        temperature=config.sampling.temperature,
    )


def dtype_of(options: ModelOptions) -> mx.Dtype | None:
    """Return the dtype of unquantized weights, or None for the default of `load_model`."""
    return DTYPES[options.dtype] if options.dtype else None


def template_arguments_of(options: ModelOptions, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """Return the arguments of the chat template; raise `ConfigError` if it does not read them."""
    return template_arguments(tokenizer, options.chat_template_kwargs, options.thinking)


def quantization_of(options: ModelOptions) -> dict[str, Any] | None:
    """Return the arguments of `quantize`, or None if the base is not to be quantized."""
    if options.quantize is None:
        return None
    return {
        "bits": options.quantize,
        "group_size": options.quantize_group,
        "mode": options.quantize_mode or "affine",
    }


def adapt(
    model: nn.Module,
    options: AdapterOptions,
    base: ModelOptions,
    seed: int,
    *,
    dropout_of_start: float | None = None,
) -> AdapterContainer:
    """Put adapters on the model: those of a file, or fresh ones over a base quantized as asked.

    `dropout_of_start` replaces the dropout of adapters from a file; None keeps theirs.
    """
    quantization = quantization_of(base)
    if start := options.start:
        if quantization:
            raise ConfigError(
                f"--quantize is given together with the adapters of {start}. These adapters belong "
                "to the base model that they were trained on. Leave out --quantize"
            )
        return AdapterContainer.from_directory(start).load(model, dropout=dropout_of_start)
    if quantization:
        quantize(model, **quantization)
    return AdapterContainer.from_model(model, adapter_config(options), seed=seed)


def adapter_config(options: AdapterOptions) -> AdapterConfig:
    """Return the adapter config of the file named in the options, or of the options themselves."""
    if options.config:
        return read_config(options.config)
    words = {name: getattr(options, name) for name in FRESH_ADAPTER_FIELDS}
    given = {name: value for name, value in words.items() if value is not None}
    names = given.pop("target_modules", None)
    config = AdapterConfig(**given)
    # PEFT's name for what is the default here.
    if names is None or names == ("all-linear",):
        return config
    (rule,) = config.rules
    # Only PEFT's form selects modules by these names, and it takes alpha instead of a scale.
    return AdapterConfig.from_dict(
        {
            "target_modules": list(names),
            "r": rule.rank,
            "lora_alpha": rule.scale * rule.rank,
            "lora_dropout": rule.dropout,
            "use_dora": rule.kind == "dora",
        }
    )


def read_config(path: Path) -> AdapterConfig:
    """Read an adapter config from a JSON file, in any form that `AdapterConfig.from_dict` reads."""
    try:
        data = read_json_object(path)
    except UnreadableError as error:
        raise ConfigError(f"the adapter config cannot be used: {error}") from error
    return AdapterConfig.from_dict(data)


def build_trainer(
    model: nn.Module,
    config: TrainConfig,
    algorithm: Algorithm,
    max_tokens: int,
    rejected: Path,
    ranks: Ranks = ALONE,
) -> Trainer:
    """Return the trainer with the algorithm's keywords, replaced where the config gives its own."""
    options = config.trainer
    known: dict[str, Any] = {
        "mini_batches": options.mini_batches,
        "epochs": options.epochs,
        "old_logprobs": config.algorithm.old_logprobs,
        "truncated": config.algorithm.truncated,
        "reward_kl": config.algorithm.reward_kl,
        "reference": _reference(config.algorithm),
    }
    if unknown := sorted(algorithm.declaration.trainer.keys() - known.keys()):
        raise ConfigError(
            f"the DECLARATION of {algorithm.name} gives the trainer {unknown[0]!r}, which an "
            f"algorithm cannot set; it can set: {', '.join(known)}"
        )
    chosen = dict(algorithm.trainer) | {n: value for n, value in known.items() if value is not None}
    if chosen.get("reward_kl") == 0 and "reward_kl" in algorithm.trainer:
        # The algorithm asks for its reference only to measure the KL divergence.
        chosen["reference"] = known["reference"]
    if algorithm.declaration.needs_teacher and "reference" not in chosen:
        raise ConfigError(
            f"the algorithm {algorithm.name} needs a teacher, and no reference model is given. "
            "Name a model with the same vocabulary by --reference NAME"
        )
    updates = config.run.steps * chosen.get("epochs", 1) * chosen.get("mini_batches", 1)
    return Trainer(
        model,
        _advantage_function(config.algorithm, algorithm, max_tokens),
        algorithm.policy_loss,
        optimizer_of(options, updates),
        max_grad_norm=options.max_grad_norm,
        micro_batch_size=options.micro_batch_size,
        checkpoint_gradients=options.checkpoint_gradients,
        rejected=rejected,
        seed=config.run.seed,
        ranks=ranks,
        **chosen,
    )


def optimizer_of(options: TrainerOptions | SFTTrainerOptions, updates: int) -> optim.Optimizer:
    """Return Adam with the learning-rate schedule of the options over `updates` updates."""
    return build_optimizer(
        options.lr,
        schedule=options.schedule,
        warmup=options.warmup,
        updates=updates,
        final_rate=options.final_lr,
        weight_decay=options.weight_decay,
    )


def _advantage_function(
    options: AlgorithmOptions, algorithm: Algorithm, max_tokens: int
) -> AdvantageFn:
    """Return the algorithm's advantage function, with the penalty of `overlong_cache` if set."""
    compute = algorithm.compute_advantages
    if options.overlong_cache is None:
        return compute
    if asked := requested_keywords(compute):
        raise ConfigError(
            f"overlong_cache subtracts a penalty from the reward, but {algorithm.name} also reads "
            f"{sorted(asked)}, which would not have the penalty. Choose an algorithm that reads "
            "the reward alone, such as grpo or dapo, or leave out overlong_cache"
        )
    return with_penalty(compute, max_tokens=max_tokens, cache=options.overlong_cache)


def _reference(options: AlgorithmOptions) -> nn.Module | Literal["base"] | None:
    """Return the reference policy that the options ask for, or None for the algorithm's own."""
    if options.reference not in (None, "base"):
        return load_model(options.reference)[0]
    return "base" if options.reference or options.beta or options.reward_kl else None


def build_evaluator(
    experiment: Experiment,
    scorer: Scorer,
    config: TrainConfig,
    opened: ExitStack,
    note: Callable[[str], None],
    ranks: Ranks = ALONE,
) -> Evaluator:
    """Return the evaluator of held-out tasks, of the run's environment and of others by name."""
    environment, options = experiment.environment, config.evaluation
    own = HeldOut(
        name=environment.name,
        tasks=environment.heldout(options.count),
        scorer=scorer,
        max_tokens=experiment.policy.sampling.max_tokens,
        split_note=environment.split_note,
        gold=right_answer_reader(environment, config.task.gold_column),
    )
    others = [_heldout_of(name, config, opened, note) for name in options.envs or ()]
    for heldout in (own, *others):
        if heldout.split_note:
            note(heldout.split_note)
    return Evaluator(
        policy=experiment.policy,
        heldout=own,
        others=others,
        samples=options.samples,
        temperature=options.temperature,
        good=options.good,
        ranks=ranks,
    )


def _heldout_of(
    name: str, config: TrainConfig, opened: ExitStack, note: Callable[[str], None]
) -> HeldOut:
    environment, rewards = find_task(with_environment(config.task, name), config.run.seed)
    opened.callback(environment.close)
    return HeldOut(
        name=environment.name,
        tasks=environment.heldout(config.evaluation.count),
        scorer=open_scorer(rewards, opened, note),
        max_tokens=sampling_of(config, environment).max_tokens,
        split_note=environment.split_note,
    )


def open_scorer(
    rewards: Rewards, opened: ExitStack, note: Callable[[str], None], *, kind: type[Scorer] = Scorer
) -> Scorer:
    """Return a scorer that passes its incidents to `note` and is closed with `opened`."""

    def on_incident(incident: Incident) -> None:
        note(str(incident))

    return opened.enter_context(closing(kind(rewards, on_incident=on_incident)))


def open_run_tracker(
    config: RunConfig,
    directory: RunDirectory,
    note: Callable[[str], None],
    *,
    resume_step: int = 0,
    sample_groups: int | None = None,
) -> Tracker:
    """Return the tracker of a run, which drops the rows of `resume_step` and later steps."""
    return open_tracker(
        directory,
        service_options(config),
        plain_settings(config),
        notice=note,
        resume_step=resume_step,
        sample_groups=sample_groups,
    )


def service_options(config: RunConfig) -> ServiceOptions:
    """Return the services that a run logs to."""
    options = config.tracking
    return ServiceOptions(
        wandb=_project_of(options.wandb),
        wandb_artifacts=options.wandb_artifacts,
        tensorboard=options.tensorboard,
        trackio=_project_of(options.trackio),
    )


def _project_of(given: bool | str | None) -> str | None:
    """Return the project that an option names; True alone means the project of this library."""
    return "textpolicy" if given is True else given or None


def plain_settings(config: RunConfig) -> dict[str, Any]:
    """Return every setting by its key, as values that JSON can hold."""
    values = {setting.key: setting.default for setting in settings_of(config)}
    return {k: str(value) if isinstance(value, Path) else value for k, value in values.items()}


def checkpoints_of(config: RunConfig, directory: RunDirectory, ranks: Ranks = ALONE) -> Checkpoints:
    """Return the checkpoints of a run."""
    folder, every = directory.checkpoints, config.run.checkpoint_every
    rows = directory.metrics, directory.samples
    if isinstance(config, SFTConfig):
        return Checkpoints(folder, every=every, after=rows)
    keep = config.run.keep_checkpoints
    return Checkpoints(folder, keep=keep, every=every, ranks=ranks, after=rows)


def source_of(config: SFTConfig) -> str:
    """Return the data of a supervised run. Raise `ConfigError` if none is given."""
    if config.data.source is None:
        raise ConfigError(
            "no data is given to learn from. Name rows of text: --data DIR, or "
            "{'data': {'source': ...}} in Python"
        )
    return config.data.source


@doing("reading the data")
def load_sft_data(config: SFTConfig, tokenizer: TokenizerWrapper) -> SFTData:
    """Return the demonstrations of a supervised run as tokens: train, valid and test."""
    encoding = Encoding(
        tokenizer=tokenizer,
        learn=config.data.learn,
        system=read_system(config.data.system),
        max_length=config.data.max_length,
        allow_special_tokens=config.model.allow_special_tokens,
        chat_template_kwargs=template_arguments_of(config.model, tokenizer),
    )
    return load_data(
        source_of(config),
        encoding,
        validation_share=config.data.validation_share,
        eval_data=config.data.eval_data,
        columns=config.data.columns,
        prompt=config.data.prompt,
        gold_column=config.data.gold_column,
    )


def sft_parameters(config: SFTConfig, directory: RunDirectory, data: SFTData) -> SFTParameters:
    """Return the numbers of a supervised run; epochs become updates on these data."""
    trainer, run = config.trainer, config.run

    def with_iterations(iterations: int) -> SFTParameters:
        return SFTParameters(
            batch_size=trainer.batch_size,
            iterations=iterations,
            steps_per_report=run.steps_per_report,
            steps_per_eval=run.eval_every,
            validation_batches=run.validation_batches,
            save_every=run.checkpoint_every,
            adapter_path=directory.latest,
            best_path=directory.best,
            accumulation=trainer.accumulation,
            packing=config.data.packing,
            max_length=config.data.max_length,
            checkpoint_gradients=trainer.checkpoint_gradients,
            patience=trainer.patience,
            seed=run.seed,
        )

    if trainer.epochs is None:
        return with_iterations(trainer.iterations or _SFT_ITERATIONS)
    return with_iterations(iterations_of(trainer.epochs, data.train, with_iterations(0)))
