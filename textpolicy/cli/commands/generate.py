"""`textpolicy generate`: sample completions of one prompt."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from textpolicy.cli.answer import Answer
from textpolicy.cli.flags import configured
from textpolicy.cli.models_of_runs import with_model_of_run
from textpolicy.cli.output import print_note
from textpolicy.cli.progress import showing_progress
from textpolicy.config import TrainConfig
from textpolicy.environments.preamble import system_messages
from textpolicy.experiment.assembly import dtype_of, template_arguments_of
from textpolicy.experiment.threads import apply_thread_option
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.generation.thinking import describe_thinking
from textpolicy.generation.unread_characters import UnreadCharacters
from textpolicy.runs import find_adapter
from textpolicy.types import Sampling


def run(options: Namespace) -> Answer:
    with showing_progress(print_note):
        return _run(options)


def _run(options: Namespace) -> Answer:
    config = configured(TrainConfig(), options)
    start = find_adapter(config.adapter.start) if config.adapter.start else None
    config = with_model_of_run(config, options, [start] if start else [])
    sampling = sampling_from_flags(options, stop=tuple(options.stop or ()))
    policy = load_policy(config, sampling, start)
    asked = [*system_messages(config.task.system), {"role": "user", "content": options.prompt}]
    prompt = asked if len(asked) > 1 else options.prompt
    UnreadCharacters(policy.tokenizer).tell_once([prompt], print_note)
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


def load_policy(
    config: TrainConfig, sampling: Sampling, adapter: Path | None = None
) -> ModelPolicy:
    """Return the policy that `generate` and `chat` sample with; say whether the model thinks."""
    apply_thread_option(config.model)
    model, tokenizer = load_model(config.model.name, adapter, dtype=dtype_of(config.model))
    arguments = template_arguments_of(config.model, tokenizer)
    if thinking := describe_thinking(tokenizer, arguments):
        print_note(thinking)
    return ModelPolicy(
        model,
        tokenizer,
        sampling,
        allow_special_tokens=config.model.allow_special_tokens,
        chat_template_kwargs=arguments,
    )
