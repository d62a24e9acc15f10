"""The page for users of other libraries names their options, and options that exist here."""

import re
from pathlib import Path

from textpolicy.config import TrainConfig, settings_of

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "coming_from.md").read_text("utf-8")
KEYS = {setting.key for setting in settings_of(TrainConfig())}


def unanswered(options: list[str], page: str) -> list[str]:
    """Return the options of GRPOConfig that the first column of the table does not name."""
    table = page.partition("### The options of GRPOConfig")[2].partition("## unsloth")[0]
    first = " ".join(re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE))
    named = set(re.findall(r"`(\w+)`", first))
    whole = tuple(name for name in named if name.endswith("_"))
    return [name for name in options if name not in named and not name.startswith(whole)]


def unknown_keys(page: str) -> list[str]:
    """Return the words of a page that look like keys of settings and are none."""
    sections = {key.partition(".")[0] for key in KEYS}
    words = re.findall(r"`(\w+\.\w+)(?: = [^`]*)?`", page)
    return [word for word in words if word.partition(".")[0] in sections and word not in KEYS]


def test_every_option_of_grpo_config_has_an_answer():
    options = (HERE / "trl_1_16_grpo_config.txt").read_text("utf-8").split()
    assert len(options) > 70
    assert unanswered(options, PAGE) == []
    assert unanswered(["beta", "gamma"], PAGE) == ["gamma"]


def test_every_key_of_a_setting_on_the_page_exists():
    assert unknown_keys(PAGE) == []
    assert unknown_keys("`trainer.lr`, `trainer.rate = 1`, `tp.Rewards`") == ["trainer.rate"]
