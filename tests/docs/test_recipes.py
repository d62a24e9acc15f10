"""The recipes pass a dry run, and their planned memory is what the tool computes."""

import json
import runpy
from pathlib import Path

import pytest

from textpolicy.cli import main
from textpolicy.config import TrainConfig
from textpolicy.config.toml import read_toml
from textpolicy.environments import check_env, load

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
PAGE = (ROOT / "docs" / "recipes.md").read_text("utf-8")
# Rows in the form of the data sets that the recipes name.
ROWS = {
    "gsm8k": lambda n: {
        "question": f"Ana has {n} apples and buys 4. How many?",
        "answer": str(n + 4),
    },
    "countdown34": lambda n: {"nums": [n, 3, 5], "target": n + 8},
}


@pytest.fixture(scope="module")
def sizes():
    """Return the names of tools/model_sizes.py."""
    return runpy.run_path(str(ROOT / "tools" / "model_sizes.py"))


@pytest.fixture
def stand_ins(sizes, tmp_path, tiny):
    """Return a function from a config to options that name a small model and rows of this disk."""
    sizes["write_folders"](tmp_path)
    model = tmp_path / "Qwen3-0.6B"
    (model / "config.json").write_bytes((tiny / "config.json").read_bytes())

    def options(config: TrainConfig) -> list[str]:
        words = ["--model", str(model)]
        given = {"--data": config.task.data, "--eval-data": config.task.eval_data}
        for number, flag in enumerate(flag for flag, value in given.items() if value):
            rows = (ROWS[config.task.env](n) for n in range(100 * number, 100 * number + 40))
            file = tmp_path / f"{number}.jsonl"
            file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            words += [flag, str(file)]
        return words

    return options


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_dry_run_of_the_recipe_succeeds(path, stand_ins, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    options = stand_ins(read_toml(path, TrainConfig()))
    assert main(["train", "--config", str(path), *options, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_begins_with_its_command_and_is_on_the_page(path):
    text = path.read_text("utf-8")
    assert f"#     textpolicy train --config recipes/{path.name}\n" in text.partition("\n\n")[0]
    assert f"`recipes/{path.name}`" in PAGE


@pytest.mark.slow
def test_the_memory_of_the_page_and_of_the_recipes_is_what_the_tool_computes(sizes, tmp_path):
    assert "\n".join(sizes["rows"]()) in PAGE
    sizes["write_folders"](tmp_path)
    for path in RECIPES:
        assert sizes["planned_line"](path, tmp_path) in path.read_text("utf-8").splitlines()


def test_the_tools_of_the_recipe_are_an_environment_whose_right_answers_earn_the_reward():
    check_env(load(str(ROOT / "recipes" / "price_tools.py")))
