"""From the config of a run to its parts.

`assemble` is the place to look for how a model, its adapters, a policy and a trainer fit together;
`textpolicy.loop` turns them round.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from textpolicy import algorithms
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.quantization.quantize import quantize
from textpolicy.adapters.shared_copy import shared_copy
from textpolicy.algorithms import Algorithm
from textpolicy.algorithms.parts.overlong import with_penalty
from textpolicy.config import DYNAMIC_ROUNDS, TrainConfig
from textpolicy.config.sections import (
    WORDS,
    AdapterOptions,
    AlgorithmOptions,
    ModelOptions,
    TrainerOptions,
)
from textpolicy.config.sft import SFTTrainerOptions
from textpolicy.environments import Environment
from textpolicy.errors import ConfigError
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import Rewards
from textpolicy.runs import RunDirectory
from textpolicy.training.advantages import requested_keywords
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer
from textpolicy.types import AdvantageFn, Sampling

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

# Settings of their own that are options of the loss too.
_LOSS_SETTINGS = ("average", "ratio_level", "kl", "weights", "beta")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run needs, ready to go round."""

    environment: Environment
    adapters: AdapterContainer
    reward: Rewards
    policy: ModelPolicy
    trainer: Trainer
    refill_rounds: int


def find_algorithm(options: AlgorithmOptions) -> Algorithm:
    """Return the algorithm of a name or of a file, with its options bound."""
    settings = {name: vars(options)[name] for name in _LOSS_SETTINGS}
    given = {name: value for name, value in settings.items() if value}
    return algorithms.get(options.name, **{**(options.options or {}), **given})


def assemble(
    config: TrainConfig,
    environment: Environment,
    reward: Rewards,
    algorithm: Algorithm,
    directory: RunDirectory,
) -> Experiment:
    """Trainer and policy on shared copies of one model: they share its base and nothing else.

    Adapters are published as the latest of `directory`.
    """
    sampling = sampling_of(config, environment)
    model, tokenizer = load_model(config.model.name, dtype=dtype_of(config.model))
    # What a warm start left out of its inputs, the sampler does not: policy gradients have none.
    adapters = adapt(model, config.adapter, config.model, config.run.seed, dropout_of_start=0.0)
    adapters.publish_path = directory.latest
    dynamic = DYNAMIC_ROUNDS if algorithm.declaration.dynamic_sampling else 1
    return Experiment(
        environment=environment,
        adapters=adapters,
        reward=reward,
        policy=ModelPolicy(shared_copy(model), tokenizer, sampling, seed=config.run.seed),
        trainer=build_trainer(
            model, config, algorithm, sampling.max_tokens, directory.rejected_batches
        ),
        refill_rounds=config.rollout.refill_rounds or dynamic,
    )


def sampling_of(config: TrainConfig, environment: Environment) -> Sampling:
    """How completions are drawn; the environment knows how long its answers are."""
    return Sampling(
        max_tokens=config.sampling.max_tokens or environment.max_tokens,
        temperature=config.sampling.temperature,
    )


def dtype_of(options: ModelOptions) -> mx.Dtype | None:
    """None is what `load_model` has."""
    return DTYPES[options.dtype] if options.dtype else None


def quantization_of(options: ModelOptions) -> dict[str, Any] | None:
    """The arguments of `quantize`, if there is anything to quantize."""
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
    """Fresh adapters on the model, quantized first if that is asked for, or those of a file.

    `dropout_of_start` is that of a file's adapters from now on; None leaves them their own.
    """
    quantization = quantization_of(base)
    if start := options.start:
        if quantization:
            raise ConfigError(
                f"the model is to be quantized, and the adapters of {start} bring the base that "
                "they were made over; leave out --quantize"
            )
        return AdapterContainer.from_directory(start).load(model, dropout=dropout_of_start)
    if quantization:
        quantize(model, **quantization)
    return AdapterContainer.from_model(model, adapter_config(options), seed=seed)


def adapter_config(options: AdapterOptions) -> AdapterConfig:
    """From a file, or from the words given; the options themselves refuse both at once."""
    if options.config:
        return read_config(options.config)
    words = {name: getattr(options, name) for name in WORDS}
    given = {name: value for name, value in words.items() if value is not None}
    names = given.pop("target_modules", None)
    config = AdapterConfig(**given)
    if names is None:
        return config
    (rule,) = config.rules
    # PEFT's way to name modules has its own reading, which knows alpha and no scale.
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
    """The adapter config in a JSON file, in any form that `AdapterConfig.from_dict` knows."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}; expected a JSON object")
    return AdapterConfig.from_dict(data)


def build_trainer(
    model: nn.Module, config: TrainConfig, algorithm: Algorithm, max_tokens: int, rejected: Path
) -> Trainer:
    """The trainer as the algorithm has it, where the config does not say otherwise."""
    options = config.trainer
    known: dict[str, Any] = {
        "mini_batches": options.mini_batches,
        "epochs": options.epochs,
        "old_logprobs": config.algorithm.old_logprobs,
        "truncated": config.algorithm.truncated,
        "reward_kl": config.algorithm.reward_kl,
        "reference": _reference(config.algorithm),
    }
    chosen = dict(algorithm.trainer) | {n: value for n, value in known.items() if value is not None}
    if chosen.get("reward_kl") == 0 and "reward_kl" in algorithm.trainer:
        # The algorithm's own reference is there for the divergence alone.
        chosen["reference"] = known["reference"]
    if algorithm.declaration.needs_teacher and "reference" not in chosen:
        raise ConfigError(
            f"{algorithm.name} learns from a teacher; name a model of the same vocabulary, "
            "--reference NAME"
        )
    updates = config.run.steps * chosen.get("epochs", 1) * chosen.get("mini_batches", 1)
    return Trainer(
        model,
        _advantages(config.algorithm, algorithm, max_tokens),
        algorithm.policy_loss,
        optimizer_of(options, updates),
        max_grad_norm=options.max_grad_norm,
        micro_batch_size=options.micro_batch_size,
        checkpoint_gradients=options.checkpoint_gradients,
        rejected=rejected,
        seed=config.run.seed,
        **chosen,
    )


def optimizer_of(options: TrainerOptions | SFTTrainerOptions, updates: int) -> optim.Optimizer:
    """Adam on the schedule of the options, over so many updates."""
    return build_optimizer(
        options.lr,
        schedule=options.schedule,
        warmup=options.warmup,
        updates=updates,
        final_rate=options.final_lr,
        weight_decay=options.weight_decay,
    )


def _advantages(options: AlgorithmOptions, algorithm: Algorithm, max_tokens: int) -> AdvantageFn:
    compute = algorithm.compute_advantages
    if options.overlong_cache is None:
        return compute
    if asked := requested_keywords(compute):
        raise ConfigError(
            f"overlong_cache takes a penalty off one reward, and {algorithm.name} looks at "
            f"{sorted(asked)} too; expected an algorithm of the reward alone, such as grpo or dapo"
        )
    return with_penalty(compute, max_tokens=max_tokens, cache=options.overlong_cache)


def _reference(options: AlgorithmOptions) -> nn.Module | Literal["base"] | None:
    """None leaves it to the algorithm."""
    if options.reference not in (None, "base"):
        return load_model(options.reference)[0]
    return "base" if options.reference or options.beta or options.reward_kl else None
