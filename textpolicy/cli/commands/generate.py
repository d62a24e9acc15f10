"""`textpolicy generate`: sample completions of one prompt."""

from argparse import Namespace
from dataclasses import asdict
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.cli.answer import Answer
from textpolicy.cli.flags import configured
from textpolicy.cli.output import print_note
from textpolicy.config import TrainConfig
from textpolicy.environments.preamble import read_system
from textpolicy.experiment.assembly import apply_thread_option, dtype_of, template_arguments_of
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.generation.thinking import describe_thinking
from textpolicy.types import Message, Sampling


def run(options: Namespace) -> Answer:
    sampling = sampling_from_flags(options, stop=tuple(options.stop or ()))
    model, tokenizer = load_sampling_model(options)
    policy = ModelPolicy(model, tokenizer, sampling, **prompt_options(options, tokenizer))
    asked = [*system_messages(options), {"role": "user", "content": options.prompt}]
    prompt = asked if len(asked) > 1 else options.prompt
    (completions,) = policy.generate([prompt], n=options.n, seed=options.seed)
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


def prompt_options(options: Namespace, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """Return how prompts become tokens, and say whether the model thinks if it can."""
    config = configured(TrainConfig(), options)
    arguments = template_arguments_of(config.model, tokenizer)
    if thinking := describe_thinking(tokenizer, arguments):
        print_note(thinking)
    return {
        "allow_special_tokens": config.model.allow_special_tokens,
        "chat_template_kwargs": arguments,
    }


def system_messages(options: Namespace) -> list[Message]:
    """Return the system message with which a conversation begins, if one is given."""
    system = read_system(configured(TrainConfig(), options).task.system)
    return [{"role": "system", "content": system}] if system else []


def load_sampling_model(options: Namespace) -> tuple[nn.Module, TokenizerWrapper]:
    """Return the model and the tokenizer that `generate` and `chat` sample with."""
    config = configured(TrainConfig(), options)
    apply_thread_option(config.model)
    return load_model(config.model.name, config.adapter.start, dtype=dtype_of(config.model))
