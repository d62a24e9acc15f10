"""`textpolicy chat`: hold a conversation with a model, through its chat template."""

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator

from textpolicy.cli.answer import Answer
from textpolicy.cli.commands.generate import load_policy, sampling_from_flags, system_messages
from textpolicy.cli.flags import configured
from textpolicy.cli.output import print_answer, print_note
from textpolicy.config import TrainConfig
from textpolicy.errors import PromptError

_HELP = "/reset starts a new conversation; /quit or Ctrl-D ends the chat"


def run(options: Namespace) -> Answer:
    config = configured(TrainConfig(), options)
    policy = load_policy(config, sampling_from_flags(options))
    beginning = system_messages(config)
    messages = list(beginning)
    for turn, line in enumerate(_read_lines()):
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
            answer = _print_answer(policy.stream(asked, seed=seed))
        except PromptError as error:
            # The line does not fit into the context: the conversation continues without it.
            print_note(f"{error}\n{_HELP}")
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]
    return Answer(data={"messages": messages}, text="")


def _read_lines() -> Iterator[str]:
    """Yield the lines of standard input; ask for each line if a person types them."""
    is_person = sys.stdin.isatty()
    if is_person:
        print_note(_HELP)
    while True:
        if is_person:
            print_note("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def _print_answer(pieces: Iterable[str]) -> str:
    """Print the pieces of an answer as they come, and return the whole answer."""
    answer: list[str] = []
    for piece in pieces:
        answer.append(piece)
        print_answer(piece, end="")
    print_answer("")
    return "".join(answer)
