"""Flags of commands, made from the settings of a config, and the config that given flags make."""

import re
from argparse import (
    SUPPRESS,
    Action,
    ArgumentError,
    ArgumentParser,
    ArgumentTypeError,
    BooleanOptionalAction,
    Namespace,
)
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from textpolicy.cli.spelled_flags import spell_as_flags
from textpolicy.config.option_types import Table, alternatives
from textpolicy.config.settings import Setting, changed, sections_of, settings_of
from textpolicy.config.toml import (
    NAMES_IN_OTHER_LIBRARIES,
    WAYS_BESIDE_SETTINGS,
    read_toml,
    suggestion_for,
)
from textpolicy.errors import ConfigError
from textpolicy.untrusted.terminal import terminal_safe

_C = TypeVar("_C")


def _flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


FLAGS_OF_OTHER_LIBRARIES = {
    "--chat-template-kwargs": "--template-args",
    "--fp16": "--dtype float16",
    "--bf16": "--dtype bfloat16",
    "--load-in-8bit": "--quantize 8",
    "--load-in-4bit": "--quantize 4",
}
"""Flags of other libraries that are no names of settings, and what to type here."""


OTHER_WAYS = {
    "import": "--adapter PATH, as in train, reads the adapters of mlx-lm, PEFT and llama.cpp",
    "fuse": "merge by: textpolicy export ADAPTER --to mlx --output DIR",
    "merge": "merge by: textpolicy export ADAPTER --to mlx --output DIR",
    "upload": "did you mean push?",
}
"""What to type in place of a command that other libraries have, or that was here before."""


class SafeParser(ArgumentParser):
    """Spells out what could control the terminal in its messages, which quote the command line."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(terminal_safe(message), file)


class FlagParser(SafeParser):
    """Answers unknown flags with the most similar known flags before any other error."""

    # No single signature is compatible with the overloads of the stub.
    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        given: list[str] = list(args or ())
        end = given.index("--") if "--" in given else len(given)
        actions = self._option_string_actions
        with_words = any(not one.option_strings for one in self._actions)
        try:
            flags = spell_as_flags(given[:end], actions, with_words=with_words)
        except ConfigError as error:
            self.error(str(error))
        # The value of a short flag may follow without a space.
        unknown = [
            f"unknown flag {flag}{self._suggestion(flag)}"
            for flag in dict.fromkeys(map(_flag_in, flags))
            if flag and not {flag, flag[:2]} & actions.keys()
        ]
        if unknown:
            self.error("\n  ".join(unknown))
        return super().parse_known_args([*flags, *given[end:]], namespace)

    def _suggestion(self, flag: str) -> str:
        flags = {known: known for known in self._option_string_actions}
        named = self._flags_by_name()
        others = {
            _flag_of(name): next(named[one] for one in ours if one in named)
            for name, ours in NAMES_IN_OTHER_LIBRARIES.items()
            if named.keys() & {*ours}
        } | {
            name: ours
            for name, ours in FLAGS_OF_OTHER_LIBRARIES.items()
            if ours.partition(" ")[0] in flags
        }
        spelled = flag.replace("_", "-")
        way = WAYS_BESIDE_SETTINGS.get(flag.strip("-").replace("-", "_"))
        if way and spelled not in others:
            return f"; {way}"
        known = others | flags
        near = get_close_matches(spelled, known, n=1)
        return f"; did you mean {known[near[0]]}?" if near else "; --help lists them"

    def _flags_by_name(self) -> dict[str, str]:
        """Return the flag of each setting of the command, by its key and by the key's last part."""
        flags = {one.dest: one.option_strings[0] for one in self._actions if one.option_strings}
        return {key.rpartition(".")[2]: flag for key, flag in flags.items()} | flags


def first_word(given: Sequence[str]) -> str | None:
    """Return the first argument that is no flag: the command."""
    return next((word for word in given if not word.startswith("-")), None)


class CommandsParser(SafeParser):
    """Answers an unknown command with the most similar known command."""

    # No single signature is compatible with the overloads of the stub.
    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        given: list[str] = list(args or ())
        (found,) = (action.choices for action in self._actions if action.dest == "command")
        commands = list(found or ())
        name = first_word(given)
        if name == "help":
            # `textpolicy help train` is what `textpolicy train --help` is.
            at = given.index("help")
            given = [*given[:at], *given[at + 1 :], "--help"]
            args, name = given, first_word(given)
        if name is not None and name not in commands:
            near = get_close_matches(name, commands, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the commands: {', '.join(commands)}"
            hint = OTHER_WAYS.get(name, hint)
            self.error(f"there is no command {name!r}; {hint}")
        options, rest = self.parse_known_args(args, namespace)
        if options.version:
            return options
        if rest:
            # `--help` must work where mlx has no backend, and runs need mlx.
            from textpolicy.runs import RunDirectory

            named = f"--adapter {rest[0]}" if RunDirectory(Path(rest[0])).exists else "--env add"
            self.error(
                f"{options.command} takes no argument {rest[0]!r}; every option has a name, such "
                f"as {named}. `textpolicy {options.command} --help` lists the options"
            )
        return options


def _flag_in(text: str) -> str | None:
    """Return the flag that argparse would read; negative numbers and texts with spaces are none."""
    if not text.startswith("-") or " " in text or re.fullmatch(r"-|-\d+|-\d*\.\d+", text):
        return None
    return text.partition("=")[0]


def add_settings(
    parser: ArgumentParser,
    config: Any,
    only: Collection[str] = (),
    *,
    helps: Mapping[str, str] | None = None,
) -> None:
    """Add a flag for each setting of `config`, or for the keys in `only`, in groups by section.

    A flag that is not given adds nothing to the namespace. `helps` replaces the help lines of
    settings that mean something else to this command than to a run.
    """
    settings = [one for one in settings_of(config) if not only or one.key in only]
    for section, about in sections_of(config).items():
        if chosen := [setting for setting in settings if setting.section == section]:
            group = parser.add_argument_group(f"[{section}] {about[0].lower()}{about[1:]}")
            for setting in chosen:
                own = (helps or {}).get(setting.key)
                add_setting(group, setting, **({"help": own} if own else {}))


def add_setting(parser: Any, setting: Setting, **rest: Any) -> None:
    """Add the flag of one setting."""
    shape: dict[str, Any] = {"action": BooleanOptionalAction}
    if Table in alternatives(setting.annotation):
        # Each argument is a table or one entry of it.
        shape = {"type": partial(parse_flag, setting.parse), "metavar": "KEY=VALUE"}
        shape |= {"nargs": "+", "action": _MergeTables}
    elif setting.annotation is not bool:
        shape = {"type": partial(parse_flag, setting.parse), "metavar": setting.metavar}
        if bool in alternatives(setting.annotation):
            shape |= {"nargs": "?", "const": True}
    known = {"dest": setting.key, "default": SUPPRESS, "help": help_of(setting)}
    parser.add_argument(setting.flag, **(known | shape | rest))


class _MergeTables(Action):
    """Stores one table of all entries that a flag and its repetitions give."""

    def __call__(
        self, parser: Any, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        merged = vars(namespace).get(self.dest)
        for table in values:
            merged = None if table is None else {**(merged or {}), **table}
        setattr(namespace, self.dest, merged)


def help_of(setting: Setting) -> str:
    """Return the help line of a setting."""
    return f"{setting.option.help} (default: {setting.shown_default})".replace("%", "%%")


def parse_flag(parse: Callable[[str], Any], text: str) -> Any:
    """Return the parsed text; argparse reports a wrong value with the message of `parse`."""
    try:
        return parse(text)
    except ConfigError as error:
        raise ArgumentTypeError(str(error)) from error


def add_config_file(parser: ArgumentParser, config: Any) -> None:
    """Add --config and --set, for commands that take a whole config."""
    parser.add_argument(
        "--config",
        metavar="FILE.toml",
        type=Path,
        help="TOML file of settings; flags and --set override it (default: none)",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action=_assignment(settings_of(config)),
        default=SUPPRESS,
        help="one setting by its key, such as trainer.lr=1e-5; may be repeated (default: none)",
    )


def add_resume(parser: ArgumentParser) -> None:
    """Add --resume and --force."""
    parser.add_argument(
        "--resume",
        metavar="RUN",
        type=Path,
        help="resume the run in this directory from its last checkpoint (default: a new run)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="resume although options differ from those that the run was started with",
    )


def configured(defaults: _C, options: Namespace) -> _C:
    """Return `defaults` changed by the file of --config, and then by flags and --set."""
    given = vars(options)
    if given.get("config") is not None:
        defaults = read_toml(given["config"], defaults)
    known = [setting.key for setting in settings_of(defaults)]
    return changed(defaults, {key: given[key] for key in known if key in given})


def configured_to_resume(defaults: _C, options: Namespace) -> _C:
    """Return the config of the run that --resume names, changed by the flags that were given."""
    # Only commands that resume runs need the run's files.
    from textpolicy.experiment.resuming import check_kind, read_started_config
    from textpolicy.runs import RunDirectory

    directory = RunDirectory(options.resume)
    started = read_started_config(directory)
    check_kind(started, defaults, directory)
    return configured(cast(_C, started), options)


def _assignment(settings: Sequence[Setting]) -> type[Action]:
    known = {setting.key: setting for setting in settings}

    class Assignment(Action):
        """Stores the value of `key=value` as the flag of the key would."""

        def __call__(
            self, parser: Any, namespace: Namespace, values: Any, option_string: str | None = None
        ) -> None:
            try:
                key, value = _assigned(str(values), known, vars(namespace))
            except ConfigError as error:
                raise ArgumentError(self, str(error)) from error
            setattr(namespace, key, value)

    return Assignment


def _assigned(text: str, known: dict[str, Setting], given: dict[str, Any]) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r}; expected KEY=VALUE, for example trainer.lr=1e-5")
    if key in known:
        try:
            return key, known[key].parse(value)
        except ConfigError as error:
            raise ConfigError(f"{key} is {error}") from error
    table, _, name = key.rpartition(".")
    if table in known and Table in alternatives(known[table].annotation):
        entry = known[table].parse(f"{{{name} = {value}}}")
        return table, (given.get(table) or {}) | entry
    raise ConfigError(f"{key} is not a setting{suggestion_for(key, list(known))}")
