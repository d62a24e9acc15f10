"""The picture at the top of the README is drawn from the files of a run, and loads nothing."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools.run_picture import history_until, picture, terminal_svg

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "run.svg"
ROWS = [
    {"step": 0, "reward": 0.25, "eval/reward": 0.5, "time/step": 1.0, "time/evaluate": 3.0},
    {"step": 1, "reward": 0.75, "time/step": 2.0},
    {"step": 2, "reward": 1.0, "time/step": 2.0},
    {"step": 3, "eval/reward": 1.0, "time/evaluate": 3.0},
]
SAMPLE = {"prompt": "4+5=", "completion": "9", "reward": 1.0}


@pytest.fixture(scope="module")
def drawn():
    """Return the picture of a run of three steps after its second step."""
    return picture(ROWS, terminal_svg(history_until(2, ROWS), SAMPLE))


def words_of(svg):
    return " ".join("".join(ElementTree.fromstring(svg).itertext()).split())


def test_the_panel_is_that_after_the_step_and_the_curve_that_of_the_whole_run(drawn):
    words = words_of(drawn)
    for shown in ("step 2/3", "0.750", "reward 1", "step 3"):
        assert shown in words
    circles = [one for one in ElementTree.fromstring(drawn).iter() if one.tag.endswith("circle")]
    held = [one for one in circles if one.get("class") == "held"]
    assert [one.get("cx") for one in held] == ["0.0", "786.0"]
    assert [one.get("cy") for one in held] == ["85.0", "0.0"]


@pytest.mark.parametrize("which", ["drawn", "the picture of the README"])
def test_a_picture_loads_nothing_and_is_small(drawn, which):
    svg = drawn if which == "drawn" else PICTURE.read_text("utf-8")
    assert "step 42/60" in words_of(svg) or which == "drawn"
    assert svg.count("http") == svg.count("http://www.w3.org/2000/svg")
    assert len(svg) < 100_000
