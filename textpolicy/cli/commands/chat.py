"""`textpolicy chat`: a conversation with a model, as its chat template has it."""

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator

from textpolicy.cli.answer import Report
from textpolicy.cli.flags import configured
from textpolicy.config import TrainConfig
from textpolicy.errors import PromptError
from textpolicy.experiment.assembly import apply_thread_option, dtype_of
from textpolicy.generation.mlx_generation import load_model, stream_answer
from textpolicy.tracking.console import terminal_safe
from textpolicy.types import Message, Sampling

_HELP = "/reset begins anew, /quit ends, and so does Ctrl-D"


def run(options: Namespace) -> Report:
    config = configured(TrainConfig(), options)
    apply_thread_option(config.model)
    sampling = Sampling(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
    )
    model, tokenizer = load_model(
        config.model.name, config.adapter.start, dtype=dtype_of(config.model)
    )
    beginning: list[Message] = (
        [{"role": "system", "content": options.system}] if options.system else []
    )
    messages = list(beginning)
    for turn, line in enumerate(_lines()):
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(beginning)
            continue
        if not line:
            continue
        asked = [*messages, {"role": "user", "content": line}]
        seed = None if options.seed is None else (options.seed << 32) + turn
        try:
            answer = _say(stream_answer(model, tokenizer, asked, sampling, seed=seed))
        except PromptError as error:
            # The conversation stands as it was before the line that does not fit.
            print(f"{error}\n{_HELP}", file=sys.stderr)
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]
    return Report(data={"messages": messages}, text="")


def _lines() -> Iterator[str]:
    """What a person types, or what is piped in, line by line."""
    person = sys.stdin.isatty()
    if person:
        print(_HELP, file=sys.stderr)
    while True:
        if person:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def _say(pieces: Iterable[str]) -> str:
    """The answer, shown while it is written."""
    said: list[str] = []
    for piece in pieces:
        said.append(piece)
        print(terminal_safe(piece), end="", flush=True)
    print()
    return "".join(said)
