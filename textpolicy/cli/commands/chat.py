"""`textpolicy chat`: hold a conversation with a model or several, through their chat template."""

import json
import re
import secrets
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from textpolicy.cli.answer import Answer
from textpolicy.cli.columns import NoView, open_view
from textpolicy.cli.commands.generate import load_policy, sampling_from_flags
from textpolicy.cli.conversations import Reply, Side, ask, save_conversations
from textpolicy.cli.flags import configured
from textpolicy.cli.models_of_runs import with_model_of_run
from textpolicy.cli.output import print_answer, print_note
from textpolicy.cli.progress import showing_progress
from textpolicy.config import TrainConfig
from textpolicy.environments.preamble import system_messages
from textpolicy.errors import ConfigError, UnwritableError
from textpolicy.generation.unread_characters import UnreadCharacters
from textpolicy.runs import read_named_adapter

_BASE = "base"
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.+))?")
HELP = """\
/reset       begin a new conversation
/again       answer the last question again
/save FILE   write the conversations to a file, a line of JSON each
/side NAME   ask only this side; /side alone asks all sides again
/quit        end the chat, as Ctrl-D does
//text       ask a question that begins with /"""


def run(options: Namespace) -> Answer:
    config = configured(TrainConfig(), options)
    with showing_progress(print_note):
        sides = _sides(config, options)
    chat = _Chat(sides, options.seed, as_json=options.json)
    for line in _read_lines():
        if line == "/quit":
            break
        chat.take(line)
    return Answer(data={"conversations": [side.data() for side in chat.sides]}, text="")


def _sides(config: TrainConfig, options: Namespace) -> list[Side]:
    """Return the models that answer: the base model if asked or alone, and each adapter."""
    adapters = [read_named_adapter(text) for text in options.adapter or ()]
    asked: list[tuple[str, Path | None]] = [(one.name, one.path) for one in adapters]
    if options.base or not adapters:
        asked.insert(0, (_BASE, None))
    names = [name for name, _ in asked]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"several sides of the chat are named {twice[0]!r}. Give each adapter a name of its "
            "own: --adapter NAME=ADAPTER"
        )
    config = with_model_of_run(config, options, [one.path for one in adapters])
    beginning = system_messages(config.task.system)
    base = load_policy(config, sampling_from_flags(options))
    return [
        Side(name, base.with_adapter(path) if path else base, beginning, path)
        for name, path in asked
    ]


class _Chat:
    """Takes the lines of a person: commands, and questions for the sides that are asked."""

    def __init__(self, sides: Sequence[Side], seed: int | None, *, as_json: bool) -> None:
        self.sides = sides
        self._asked = list(sides)
        self._seed = secrets.randbits(32) if seed is None else seed
        self._as_json = as_json
        self._lines = 0
        self._saved: set[Path] = set()
        self._unread = UnreadCharacters(sides[0].policy.tokenizer)

    def take(self, line: str) -> None:
        """Do what a line says."""
        self._lines += 1
        command = _COMMAND.fullmatch(line)
        if command is None:
            self._ask(self._asked, line.removeprefix("/") if line.startswith("//") else line)
            return
        match command.groups():
            case "reset", None:
                for side in self._asked:
                    side.reset()
            case "again", None:
                self._ask_again()
            case "save", str(file):
                self._save(Path(file).expanduser())
            case "side", name:
                self._choose(name)
            case _:
                print_note(f"{line} is no command. The commands:\n{HELP}")

    def _ask(self, sides: Sequence[Side], question: str) -> None:
        if not question:
            return
        self._unread.tell_once([question], print_note)
        view = NoView() if self._as_json else open_view([side.name for side in sides])
        # The number of the line is a part of the seed, so a repeated question is answered anew.
        for reply in ask(sides, question, (self._seed << 32) + self._lines - 1, view):
            if self._as_json:
                print_answer(json.dumps(asdict(reply)))
            elif reply.error:
                print_note(f"{reply.error}\n{HELP}" if len(sides) == 1 else _failure(reply))

    def _ask_again(self) -> None:
        questions = {side: question for side in self._asked if (question := side.take_back())}
        if not questions:
            print_note("there is no question to answer again")
        for question in dict.fromkeys(questions.values()):
            self._ask([side for side, last in questions.items() if last == question], question)

    def _choose(self, name: str | None) -> None:
        names = [side.name for side in self.sides]
        if name is not None and name not in names:
            print_note(f"no side is named {name!r}; the sides: {', '.join(names)}")
            return
        self._asked = [side for side in self.sides if name in (None, side.name)]

    def _save(self, path: Path) -> None:
        if path.exists() and path not in self._saved:
            print_note(f"{path} exists already and is not overwritten. Name another file")
            return
        try:
            save_conversations(self.sides, path)
        except UnwritableError as error:
            print_note(str(error))
            return
        self._saved.add(path)
        print_note(f"saved to {path}")


def _failure(reply: Reply) -> str:
    return f"[{reply.side}] {reply.error}"


def _read_lines() -> Iterator[str]:
    """Yield the lines of standard input; ask for each line if a person types them."""
    is_person = sys.stdin.isatty()
    if is_person:
        print_note(HELP)
    while True:
        if is_person:
            print_note("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()
