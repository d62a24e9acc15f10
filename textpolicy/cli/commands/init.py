"""`textpolicy init`: write the files of a project to start from."""

import shlex
from argparse import Namespace
from pathlib import Path

from textpolicy.cli.answer import Answer
from textpolicy.cli.next_commands import next_lines
from textpolicy.cli.typed_flags import short_path
from textpolicy.errors import ConfigError
from textpolicy.file_writing import atomic_replace, make_writable_folder

_PROJECTS = Path(__file__).parents[1] / "projects"
# Python files of a project are no modules of this package.
_SUFFIX = ".txt"


def run(options: Namespace) -> Answer:
    """Write the project, unless one of its files is there already."""
    folder: Path = options.folder
    files = {
        folder / path.name.removesuffix(_SUFFIX): path.read_bytes()
        for path in sorted((_PROJECTS / options.kind).iterdir())
    }
    if present := [path.name for path in files if path.exists()]:
        raise ConfigError(
            f"{folder} holds {', '.join(present)} already, and nothing was written. "
            "Name another folder: textpolicy init DIR"
        )
    for path, content in files.items():
        make_writable_folder(folder, path)
        with atomic_replace(path) as partial:
            partial.write_bytes(content)
    written, following = [path.name for path in files], _next_commands(folder)
    data = {"folder": str(folder), "files": written, "next": following}
    text = f"wrote {', '.join(written)} to {folder}; README.md has all steps"
    return Answer(data=data, text=f"{text}\n{next_lines(following)}")


def _next_commands(folder: Path) -> dict[str, str]:
    enter = {} if folder.resolve() == Path.cwd() else {"go there": ["cd", short_path(folder)]}
    commands = {
        **enter,
        "check it": ["textpolicy", "check", "--config", "run.toml", "--sample", "4"],
        "train it": ["textpolicy", "train", "--config", "run.toml"],
    }
    return {name: shlex.join(words) for name, words in commands.items()}
