"""Configs of any allowed values survive TOML, and flags mean what a file means."""

import argparse
from datetime import date
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tests.strategies import TOML_LIKE, examples
from textpolicy.cli.flags import add_settings, configured
from textpolicy.config import SFTConfig, TrainConfig, changed, read_toml, settings_of, to_toml
from textpolicy.config.option_types import UNSET, Table, alternatives
from textpolicy.config.settings import Setting
from textpolicy.config.toml import config_from
from textpolicy.errors import ConfigError

CONFIGS = {"train": TrainConfig(), "sft": SFTConfig()}
EVERY = pytest.mark.parametrize("command", CONFIGS)
SETTINGS = [setting for config in CONFIGS.values() for setting in settings_of(config)]
HUGE = st.sampled_from([0, -1, 2**63, 2**64, 10**400, -(10**400)])
TEXTS = st.text(max_size=12)
NUMBERS = st.floats(allow_nan=False) | st.floats(1e-9, 10)
TABLES = st.dictionaries(
    TEXTS,
    st.recursive(
        st.booleans() | st.integers() | NUMBERS | TEXTS | st.dates() | st.datetimes() | st.times(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)
BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    NoneType: st.none(),
    bool: st.booleans(),
    int: st.integers(0, 9) | st.integers() | HUGE,
    float: NUMBERS | st.integers() | HUGE,
    str: TEXTS,
    Path: TEXTS.map(Path),
    tuple[str, ...]: st.lists(TEXTS, max_size=3).map(tuple),
    Table: TABLES,
}
ANYTHING = st.one_of(*BY_TYPE.values(), st.lists(st.integers(), max_size=2), st.just(float("nan")))


def values_of(setting: Setting) -> st.SearchStrategy[Any]:
    """Return the values of the types of a setting, allowed or not."""
    kinds = alternatives(setting.annotation)
    return st.one_of(
        st.sampled_from(get_args(kind)) if get_origin(kind) is Literal else BY_TYPE[kind]
        for kind in kinds
    )


def is_allowed(setting: Setting, value: Any) -> bool:
    try:
        setting.accept(value)
    except ConfigError:
        return False
    return True


@st.composite
def allowed_values(draw: st.DrawFn, config: Any) -> dict[str, Any]:
    """Return allowed values of some settings, which may not be allowed together."""
    settings = draw(st.lists(st.sampled_from(settings_of(config)), max_size=6, unique_by=_key))
    drawn = {setting: draw(values_of(setting)) for setting in settings}
    return {one.key: one.accept(value) for one, value in drawn.items() if is_allowed(one, value)}


def _key(setting: Setting) -> str:
    return setting.key


def allowed_config(config: Any, values: dict[str, Any]) -> Any:
    """Return the config with the values, as far as each section allows them together."""
    for section in dict.fromkeys(key.partition(".")[0] for key in values):
        own = {key: value for key, value in values.items() if key.startswith(f"{section}.")}
        try:
            config = changed(config, own)
        except ConfigError as error:
            assert f"[{section}]" in str(error)
    return config


@EVERY
@given(data=st.data())
def test_a_config_of_any_allowed_values_survives_writing_and_reading(tmp_path, command, data):
    config = CONFIGS[command]
    written = allowed_config(config, data.draw(allowed_values(config)))
    path = tmp_path / "run.toml"
    path.write_text(to_toml(written), "utf-8")
    assert read_toml(path, config) == written


def as_text(value: Any) -> str | None:
    """Return the text of a value on the command line, or None if it cannot be said there."""
    if value is None:
        return UNSET
    if isinstance(value, tuple):
        odd = any(set(text) & set(",()") for text in value)
        return None if odd or value in ((), ("",)) else ",".join(value)
    if isinstance(value, dict):
        section = to_toml(changed(TrainConfig(), {"algorithm.options": value}))
        (line,) = (line for line in section.split("\n") if line.startswith("options = "))
        return line.removeprefix("options = ")
    return repr(value) if isinstance(value, float) else str(value)


@EVERY
@given(data=st.data())
def test_flags_give_the_config_that_a_file_of_the_same_values_gives(tmp_path, command, data):
    config = CONFIGS[command]
    values = data.draw(allowed_values(config))
    flags = {one.key: one for one in settings_of(config)}
    argv = []
    for key, value in values.items():
        flag = flags[key].flag
        if value is True:
            argv.append(flag)
        elif value is False:
            # A flag that also takes a name has no --no-.
            takes_name = flags[key].annotation is not bool
            argv.append(f"{flag}=no" if takes_name else flag.replace("--", "--no-", 1))
        else:
            text = as_text(value)
            assume(text is not None and not (isinstance(value, str) and text == UNSET))
            argv.append(f"{flag}={text}")
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_settings(parser, config)
    try:
        expected = changed(config, values)
    except ConfigError:
        with pytest.raises(ConfigError):
            configured(config, parser.parse_args(argv))
        return
    assert configured(config, parser.parse_args(argv)) == expected
    path = tmp_path / "run.toml"
    path.write_text(to_toml(expected), "utf-8")
    assert read_toml(path, config) == expected


@given(TABLES)
@example({"since": date(2026, 1, 2), "a.b": {"": [1, "x"]}})
def test_any_table_of_options_survives_writing_and_reading(tmp_path, table):
    written = changed(TrainConfig(), {"algorithm.options": table})
    path = tmp_path / "run.toml"
    path.write_text(to_toml(written), "utf-8")
    assert read_toml(path, TrainConfig()) == written


@given(st.sampled_from(SETTINGS), st.data())
@examples(2)
def test_the_text_of_a_value_is_parsed_to_the_value(setting, data):
    value = data.draw(values_of(setting))
    text = str(value).lower() if isinstance(value, bool) else as_text(value)
    assume(is_allowed(setting, value) and text is not None)
    assume(not (isinstance(value, str) and text == UNSET))
    assert setting.parse(text) == setting.accept(value)


@given(st.sampled_from(SETTINGS), ANYTHING)
@example(next(one for one in SETTINGS if one.key == "trainer.lr"), 10**400)
@example(next(one for one in SETTINGS if one.key == "algorithm.weights"), [])
def test_any_value_is_accepted_as_it_is_or_refused_in_words(setting, value):
    try:
        accepted = setting.accept(value)
    except ConfigError as error:
        assert f"expected {setting.expected}" in str(error)
    else:
        given = tuple(value) if isinstance(value, list) else value
        assert accepted == given or str(accepted) == given
        assert setting.accept(accepted) == accepted


@given(
    st.sampled_from(SETTINGS),
    TEXTS | st.sampled_from(["1e999", "-1", "nan", "9" * 400, "9" * 5000, "{a = 1979-05-27}"]),
)
def test_any_text_of_a_flag_is_a_value_that_a_file_may_hold_or_is_refused(setting, text):
    try:
        value = setting.parse(text)
    except ConfigError as error:
        assert f"expected {setting.expected}" in str(error)
    else:
        assert setting.accept(value) == value


@EVERY
@given(
    section=st.sampled_from(["trainer", "run", "adapter", "model"]) | TEXTS.filter(bool),
    name=TEXTS,
    value=ANYTHING,
)
def test_an_unknown_key_is_refused_by_name(command, section, name, value):
    config = CONFIGS[command]
    key = f"{section}.{name}"
    assume(key not in {setting.key for setting in settings_of(config)})
    with pytest.raises(ConfigError) as refused:
        config_from({section: {name: value}}, config, "run.toml")
    assert f"run.toml cannot be used:\n  {key} is not a setting" in str(refused.value)


@EVERY
@given(text=TOML_LIKE)
@examples(2)
def test_a_file_of_any_text_gives_a_config_or_a_config_error(tmp_path, command, text):
    config = CONFIGS[command]
    path = tmp_path / "run.toml"
    path.write_text(text, "utf-8", newline="")
    try:
        found = read_toml(path, config)
    except ConfigError as error:
        assert str(path) in str(error)
    else:
        path.write_text(to_toml(found), "utf-8")
        assert read_toml(path, config) == found
