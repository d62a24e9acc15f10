"""`textpolicy generate`: sample completions of one prompt."""

from argparse import Namespace
from dataclasses import asdict

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.cli.answer import Answer
from textpolicy.cli.flags import configured
from textpolicy.config import TrainConfig
from textpolicy.experiment.assembly import apply_thread_option, dtype_of
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.types import Sampling


def run(options: Namespace) -> Answer:
    sampling = sampling_from_flags(options, stop=tuple(options.stop or ()))
    policy = ModelPolicy(
        *load_sampling_model(options),
        sampling,
        allow_special_tokens=may_spell_special_tokens(options),
    )
    (completions,) = policy.generate([options.prompt], n=options.n, seed=options.seed)
    texts = [completion.text for completion in completions]
    if len(texts) > 1:
        texts = [f"[{number}] {text}" for number, text in enumerate(texts, start=1)]
    data = {"prompt": options.prompt, "completions": [asdict(c) for c in completions]}
    return Answer(data=data, text="\n".join(texts))


def sampling_from_flags(options: Namespace, stop: tuple[str, ...] = ()) -> Sampling:
    """Return how `generate` and `chat` sample tokens."""
    return Sampling(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        stop=stop,
    )


def may_spell_special_tokens(options: Namespace) -> bool:
    """Return whether prompts may spell control tokens."""
    return configured(TrainConfig(), options).model.allow_special_tokens


def load_sampling_model(options: Namespace) -> tuple[nn.Module, TokenizerWrapper]:
    """Return the model and the tokenizer that `generate` and `chat` sample with."""
    config = configured(TrainConfig(), options)
    apply_thread_option(config.model)
    return load_model(config.model.name, config.adapter.start, dtype=dtype_of(config.model))
