"""Configs: one declaration of every option, read from files and flags, written and read back."""

import argparse
import inspect
import string
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from random import Random
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest

import textpolicy as tp
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.cli.flags import FlagParser, add_config_file, add_settings, configured
from textpolicy.cli.parser import build_parser, commands_of
from textpolicy.config import (
    DEMO,
    SFTConfig,
    TrainConfig,
    changed,
    check_can_be_read_back,
    read_toml,
    settings_of,
    to_toml,
)
from textpolicy.config.option_types import Table, alternatives
from textpolicy.config.settings import above, check, option
from textpolicy.errors import ConfigError
from textpolicy.experiment.assembly import service_options
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = TrainConfig()
SETTINGS = {setting.key: setting for setting in settings_of(DEFAULTS)}


@pytest.fixture
def read(tmp_path):
    """Return a function that reads the text of a TOML file over the default config."""

    def run(text: str, defaults: Any = DEFAULTS) -> Any:
        path = tmp_path / "run.toml"
        path.write_text(text, "utf-8")
        return read_toml(path, defaults)

    return run


@pytest.fixture
def refusal(read):
    """Return a function that returns the error about the text of a TOML file."""

    def run(text: str) -> str:
        with pytest.raises(ConfigError) as raised:
            read(text)
        assert "run.toml" in str(raised.value)
        return str(raised.value)

    return run


def given(*argv: str, defaults: TrainConfig = DEFAULTS) -> TrainConfig:
    """Return the config of a command line."""
    parser = FlagParser(exit_on_error=False)
    add_config_file(parser, defaults)
    add_settings(parser, defaults)
    return configured(defaults, parser.parse_args(argv))


def test_files_override_defaults_and_flags_override_files(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[trainer]\nlr = 1e-4\nwarmup = 3\n[run]\nsteps = 7\n")
    config = given("--config", str(path), "--lr", "2e-4", "--set", "run.seed=5")
    assert config.trainer.lr == 2e-4 and config.trainer.warmup == 3
    assert config.run.steps == 7 and config.run.seed == 5
    assert config.rollout == DEFAULTS.rollout


def test_the_last_of_a_flag_and_a_set_of_one_setting_counts():
    assert given("--lr", "1e-4", "--set", "trainer.lr=2e-4").trainer.lr == 2e-4
    assert given("--set", "trainer.lr=2e-4", "--lr", "1e-4").trainer.lr == 1e-4


def test_none_on_the_command_line_unsets_a_value_of_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[sampling]\nmax_tokens = 5\n[run]\nstop_on_collapse = true\n")
    config = given("--config", str(path), "--max-tokens", "none", "--no-stop-on-collapse")
    assert config.sampling.max_tokens is None and config.run.stop_on_collapse is False


def test_set_reaches_inside_a_table():
    argv = ["--set", "algorithm.options.clip_high=0.28", "--set", "algorithm.options.how='x'"]
    assert given(*argv).algorithm.options == {"clip_high": 0.28, "how": "x"}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("trainer.lr", ["KEY=VALUE"]),
        ("trainer.lrr=1", ["trainer.lrr", "did you mean trainer.lr?"]),
        ("trainer.rank=8", ["trainer.rank", "did you mean adapter.rank?"]),
        ("run.save_steps=8", ["run.save_steps", "did you mean run.checkpoint_every?"]),
        ("trainer.gradient_accumulation_steps=4", ["divided by num_generations"]),
        ("trainer.lr=fast", ["trainer.lr is 'fast'", "a number above 0"]),
        ("trainer.schedule=steep", ["'steep'", "one of constant, linear, cosine"]),
    ],
)
def test_the_error_about_a_wrong_assignment_says_what_is_allowed(argument, words):
    with pytest.raises(argparse.ArgumentError) as raised:
        given("--set", argument)
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[trainer]\nlrr = 1", ["trainer.lrr is not a setting", "did you mean trainer.lr?"]),
        ("[trainer]\ngroup_size = 4", ["did you mean rollout.group_size?"]),
        ("[optimizer]\nlr = 1e-3", ["optimizer.lr", "did you mean trainer.lr?"]),
        ("[trainer]\nlearning_rate = 1", ["did you mean trainer.lr?"]),
        ("num_generations = 4", ["did you mean rollout.group_size?"]),
        (
            "[evaluation]\ndata = 'held.jsonl'",
            ["evaluation.data is not a setting; did you mean task.eval_data?"],
        ),
        ("[trainr]", ["trainr is not a setting"]),
        ("lr = 1e-3", ["lr is not a setting", "did you mean trainer.lr?"]),
        ("trainer = 5", ["trainer is not a setting"]),
        ("[trainer]\nlr = 'fast'", ["trainer.lr is 'fast'; expected a number above 0"]),
        ("[trainer]\nlr = 0", ["trainer.lr is 0; expected a number above 0"]),
        ("[trainer]\nlr = nan", ["trainer.lr is nan"]),
        ("[trainer]\nlr = true", ["trainer.lr is True"]),
        ("[run]\nsteps = 2.5", ["run.steps is 2.5; expected a whole number, at least 1"]),
        ("[run]\nseed = -1", ["run.seed is -1; expected a whole number from 0 to 2^64 - 1"]),
        ("[run]\nseed = 18446744073709551616", ["run.seed is 18446744073709551616"]),
        ("[run]\nsteps = true", ["run.steps is True"]),
        ("[trainer]\nschedule = 'steep'", ["one of constant, linear, cosine"]),
        ("[adapter]\nkeys = [1]", ["expected a list of texts"]),
        ("[task]\nenv = 5", ["expected text"]),
        ("[task]\non_reward_error = 'explode'", ["one of fail, skip or a number"]),
        ("[task]\non_reward_error = inf", ["on_reward_error is inf"]),
        ("[algorithm]\noptions = 5", ["expected a table"]),
        ("[trainer", ["not TOML"]),
        ("[model]\nquantize_mode = 'mxfp4'", ["without quantize. Add quantize"]),
        ("[adapter]\nconfig = 'a.json'\nrank = 3", ["given together with ['rank']"]),
        ("[adapter]\nstart = 'a'\nrank = 3", ["have their own config; leave out"]),
    ],
)
def test_the_error_about_a_mistake_names_the_file_the_value_and_what_is_expected(
    text, words, refusal
):
    message = refusal(text)
    assert all(word in message for word in words), message


@cache
def train_parser() -> argparse.ArgumentParser:
    return build_parser("train")


BOOLEANS = [
    *((word, True) for word in ("True", "true", "yes", "YES", "on", "1")),
    *((word, False) for word in ("False", "false", "no", "off", "0")),
]


@pytest.mark.parametrize(("word", "meant"), BOOLEANS)
def test_every_boolean_option_understands_the_usual_words(word, meant, read):
    booleans = [one for one in SETTINGS.values() if one.annotation is bool]
    assert len(booleans) > 5
    for setting in booleans:
        start = changed(DEFAULTS, {setting.key: not meant, "tracking.wandb": "needed"})
        expected = changed(start, {setting.key: meant})
        value = word if word in ("true", "false", "0", "1") else f"'{word}'"
        text = f"[{setting.section}]\n{setting.name} = {value}"
        assert read(text, start) == expected
        for argv in (
            [f"{setting.flag}={word}"],
            [setting.flag, word],
            [f"--{setting.key}={word}"],
            ["--set", f"{setting.key}={word}"],
        ):
            options = train_parser().parse_args(["train", *argv])
            assert configured(start, options) == expected, argv


@pytest.mark.parametrize(
    ("given_as", "project"),
    [("True", "textpolicy"), ("yes", "textpolicy"), ("mine", "mine"), ("False", None)],
)
def test_a_service_without_a_name_has_the_project_of_the_library(given_as, project, read):
    values = {"True": "true", "False": "false"}
    for name in ("wandb", "trackio"):
        for config in (
            given(f"--{name}={given_as}"),
            given(f"--tracking.{name}", given_as),
            given("--set", f"tracking.{name}={given_as}"),
            read(f"[tracking]\n{name} = {values.get(given_as, repr(given_as))}"),
            read(f"[tracking]\n{name} = '{given_as}'"),
        ):
            assert vars(service_options(config))[name] == project
            again = read(to_toml(config))
            assert service_options(again) == service_options(config)
    assert service_options(given("--wandb", "--lr", "1")).wandb == "textpolicy"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("[trainer]\nlr = 1e-4", "trainer.lr", 1e-4),
        ("[trainer]\nlr = '1e-4'", "trainer.lr", 1e-4),
        ("[run]\nsteps = 10_000", "run.steps", 10_000),
        ("[run]\nsteps = 1e3", "run.steps", 1000),
        ("[sampling]\nmax_tokens = 'None'", "sampling.max_tokens", None),
    ],
)
def test_numbers_are_understood_in_files_and_on_the_command_line(text, key, value, read):
    expected = changed(DEFAULTS, {key: value})
    assert read(text) == expected
    word = text.rpartition(" ")[2].strip("'")
    assert given(f"--{key}", word) == given("--set", f"{key}={word}") == expected


@pytest.mark.parametrize("names", ["'all-linear'", "['all-linear']"])
def test_one_name_is_a_list_of_one(names, read):
    assert read(f"[adapter]\ntarget_modules = {names}").adapter.target_modules == ("all-linear",)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("wandb = True", "Write wandb = true"),
        ("tensorboard = off # for now", "Write tensorboard = false"),
        ("wandb = my-project", 'Write wandb = "my-project"'),
        ("wandb = None", "Leave out the line of wandb for no value"),
    ],
)
def test_the_error_about_a_word_of_python_in_a_file_says_what_to_write(line, hint, refusal):
    assert refusal(f"[tracking]\n{line}\n").endswith(hint)


def test_another_value_of_a_boolean_flag_is_an_error_that_says_what_to_write(capsys):
    with pytest.raises(SystemExit):
        given("--tensorboard=maybe")
    wanted = "--tensorboard is 'maybe'; write --tensorboard alone for true, or --no-tensorboard"
    assert wanted in capsys.readouterr().err
    options = train_parser().parse_args(["train", "--dry-run=True", "--json=no"])
    assert options.dry_run and not options.json


def test_one_error_lists_all_mistakes_of_a_file(refusal):
    message = refusal("[trainer]\nlr = 'fast'\nlrr = 1\n[run]\nsteps = 0\n")
    assert len(message.splitlines()) == 4


def test_the_error_about_a_missing_file_names_the_file():
    with pytest.raises(ConfigError, match=r"the config .* /no/run\.toml cannot be read: No such"):
        read_toml(Path("/no/run.toml"), DEFAULTS)


def test_a_config_made_in_python_is_checked_too():
    with pytest.raises(ConfigError, match=r"\[trainer\] lr is -1.0; expected a number above 0"):
        changed(DEFAULTS, {"trainer.lr": -1.0})
    with pytest.raises(ConfigError, match=r"\[run\] steps is 0; expected a whole number"):
        changed(DEFAULTS, {"run.steps": 0})


@pytest.mark.parametrize("config", [DEFAULTS, DEMO, SFTConfig()], ids=["train", "demo", "sft"])
def test_a_written_config_reads_back_as_an_equal_config(config, read):
    assert read(to_toml(config), type(config)()) == config


def test_a_written_config_has_every_setting_and_explains_unset_ones():
    text = to_toml(DEFAULTS)
    for setting in SETTINGS.values():
        value = f"{setting.name} = " if setting.default is not None else f"# {setting.name}: "
        assert text.count(f"\n{value}") >= 1


CHARACTERS = string.printable + "äß漢🙂\x00\x1b\x7f\x85\u2028\ue000\"\\'#[]{}=\r\n"


def some_text(random: Random) -> str:
    return "".join(random.choices(CHARACTERS, k=random.randrange(12)))


def some_value(annotation: Any, random: Random) -> Any:
    """Return a random value of one of the types that the annotation allows."""
    kind = random.choice(alternatives(annotation))
    if get_origin(kind) is Literal:
        return random.choice(get_args(kind))
    makers = {
        NoneType: lambda: None,
        bool: lambda: random.random() < 0.5,
        int: lambda: random.randrange(-(2**62), 2**62),
        float: lambda: random.choice([random.lognormvariate(0, 30), 1e300, 5e-324, 0.1, 3.0]),
        str: lambda: some_text(random),
        Path: lambda: Path(some_text(random)),
        tuple[str, ...]: lambda: tuple(some_text(random) for _ in range(random.randrange(4))),
        Table: lambda: {some_text(random): random.choice([1, 0.5, True, "x", [1, 2]])},
    }
    return makers[kind]()


def some_config(random: Random) -> TrainConfig:
    """Return a config with random allowed values."""
    values: dict[str, Any] = {}
    ways_to_adapt = {"adapter.config", "adapter.start", "adapter.target_modules"}
    for key in sorted(SETTINGS.keys() - ways_to_adapt - {"model.quantize"}):
        value = some_value(SETTINGS[key].annotation, random)
        with suppress(ConfigError):
            values[key] = SETTINGS[key].accept(value)
    if (staleness := values.get("rollout.max_staleness")) is not None:
        steps = values.get("rollout.steps_per_generation", 1)
        values["rollout.max_staleness"] = max(staleness, steps)
    if "rollout.ray" in values:
        values["rollout.workers"] = max(1, values.get("rollout.workers", 1))
    needed = {"model.quantize": 4, "tracking.wandb": "a project"}
    return changed(DEFAULTS, values | needed)


def test_random_values_are_written_and_read_back(read):
    random = Random(0)
    for _ in range(20):
        config = some_config(random)
        assert read(to_toml(config)) == config


def test_text_that_no_file_can_hold_is_refused():
    with pytest.raises(ConfigError, match="task"):
        changed(DEFAULTS, {"task.env": "\udcff"})


def test_sections_of_any_config_are_checked_with_all_their_mistakes():
    @dataclass(frozen=True)
    class Two:
        a: float = option(1.0, "a", limit=above(0))
        b: Literal["x", "y"] = option("x", "b")

        def __post_init__(self) -> None:
            check(self)

    with pytest.raises(ConfigError, match=r"a is 0; .*\nb is 'z'; expected one of x, y"):
        Two(a=0, b="z")


@cache
def flags_of(command: str) -> dict[str, argparse.Action]:
    """Return the argparse actions of a command by the setting that they set."""
    return {action.dest: action for action in commands_of(build_parser())[command]._actions}


SWITCHES = {
    "help",
    "json",
    "config",
    "set",
    "dry_run",
    "measure",
    "resume",
    "force",
    "all_settings",
}
SWITCHES |= {"ranks", "rank_deadline", "backend"}
CONFIGS = {"train": DEFAULTS, "sft": SFTConfig()}


@pytest.mark.parametrize("command", CONFIGS)
def test_the_help_and_the_config_name_the_same_options(command):
    settings = {setting.key: setting for setting in settings_of(CONFIGS[command])}
    actions = flags_of(command)
    assert actions.keys() - SWITCHES == settings.keys()
    for key, setting in settings.items():
        assert setting.flag in actions[key].option_strings
        assert actions[key].help == f"{setting.option.help} (default: {setting.shown_default})"


def test_an_option_of_two_commands_is_declared_once():
    train, sft = flags_of("train"), flags_of("sft")
    shared = train.keys() & sft.keys() - SWITCHES - {"run.output"}
    assert len(shared) > 20
    for key in shared:
        own = key in ("trainer.lr", "trainer.epochs", "run.checkpoint_every")
        same = own or train[key].help == sft[key].help
        assert same and train[key].option_strings == sft[key].option_strings


@pytest.mark.parametrize("command", CONFIGS)
def test_no_two_options_share_a_flag(command):
    flags = [setting.flag for setting in settings_of(CONFIGS[command])]
    assert len(set(flags)) == len(flags)


@pytest.mark.parametrize("command", ["demo", "eval", "plan", "generate", "check", "bench"])
def test_other_commands_describe_a_shared_option_as_train_does(command):
    shared = flags_of(command).keys() & SETTINGS.keys()
    assert shared
    # A command that trains nothing takes the base model without adapters.
    for key in shared - {"run.steps", "task.reward", "adapter.start"}:
        assert flags_of(command)[key].help == flags_of("train")[key].help


def test_a_setting_that_may_be_unset_is_unset_by_default():
    # A file has no word for "unset": leaving the line out must mean it.
    for setting in SETTINGS.values():
        assert (setting.default is None) == setting.optional


def test_the_described_defaults_of_the_library_are_its_defaults():
    rule = LoRARule()
    unset = {name: SETTINGS[f"adapter.{name}"].option.unset for name in ("kind", "rank", "scale")}
    unset["scale"], _, _ = unset["scale"].partition("; with a model that is not tiny")
    assert unset == {"kind": rule.kind, "rank": str(rule.rank), "scale": f"{rule.scale:g}"}
    defaults = {known.name: known.default for known in fields(Trainer)}
    trainer, algorithm = DEFAULTS.trainer, SETTINGS
    assert trainer.max_grad_norm == defaults["max_grad_norm"]
    assert trainer.checkpoint_gradients == defaults["checkpoint_gradients"]
    assert algorithm["algorithm.old_logprobs"].option.unset == defaults["old_logprobs"]
    assert algorithm["algorithm.truncated"].option.unset == defaults["truncated"]
    keywords = inspect.signature(build_optimizer).parameters
    names = {"schedule": "schedule", "warmup": "warmup", "final_lr": "final_rate"}
    for name, keyword in (names | {"weight_decay": "weight_decay"}).items():
        assert getattr(trainer, name) == keywords[keyword].default


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_section_checks_itself(config):
    for known in fields(config):
        section = getattr(config, known.name)
        assert is_dataclass(section) and "__post_init__" in type(section).__dict__


def test_the_page_of_options_is_what_the_tool_writes():
    command = [sys.executable, str(ROOT / "tools" / "configuration_page.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_artifacts_need_a_project():
    with pytest.raises(ConfigError, match="without a project of Weights & Biases"):
        changed(SFTConfig(), {"tracking.wandb_artifacts": True})


def test_a_bound_on_staleness_has_room_for_the_steps_of_a_generation():
    argv = ["--steps-per-generation", "3", "--max-staleness"]
    with pytest.raises(ConfigError, match="max_staleness to at least 2, or steps_per_generation"):
        given(*argv, "1")
    assert given(*argv, "2").rollout.max_staleness == 2


DEEP = {"a": {}}
for _ in range(70):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("config", "changes", "problem"),
    [
        (
            SFTConfig(),
            {"data.system": "x" * 300_000},
            r"has 301,\d+ bytes, and at most 262,144",
        ),
        (SFTConfig(), {"data.system": "." * 2001}, "a line has 2,001 dots; expected at most 2,000"),
        (SFTConfig(), {"data.system": "é" * 140_000}, r"has 28\d,\d+ bytes"),
        (TrainConfig(), {"algorithm.options": DEEP}, "nested more than 64 deep"),
    ],
    ids=["large", "dots", "bytes and not characters", "deep"],
)
def test_a_config_that_could_not_be_read_back_starts_no_run(
    tmp_path, config, changes, problem, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = changed(config, changes)
    (key,) = changes
    with pytest.raises(ConfigError, match=rf"{problem}.*The longest setting is {key}"):
        tp.run(config, output="run")
    assert list(tmp_path.iterdir()) == []


def test_a_config_at_the_bounds_is_read_back(tmp_path):
    config = changed(SFTConfig(), {"data.system": "." * 2000, "data.source": "x" * 250_000})
    check_can_be_read_back(config)
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert read_toml(tmp_path / "run.toml", SFTConfig()) == config
