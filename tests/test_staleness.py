"""The benchmark of staleness samples groups exactly as stale as allowed, and tables its records."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def staleness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("staleness")


@pytest.mark.slow
def test_each_simulated_group_is_as_stale_as_allowed(staleness):
    record = staleness.measure(staleness.Unit(way="simulated", max_staleness=2, steps=5))
    assert record["staleness"] == record["token_staleness"] == (0 + 1 + 2 + 2 + 2) / 5
    assert record["mixed_tokens"] == record["dropped"] == 0
    # The last two steps train on what was sampled before.
    assert len(record["curve"]) == 3


def record_of(staleness, seed, after, **changes):
    unit = staleness.Unit(way="simulated", max_staleness=4, seed=seed, steps=400)
    known = {"before": 0.5, "after": after, "gain": after - 0.5, "standard_error": 0.02}
    facts = {"staleness": 3.9, "token_staleness": 3.8, "setting": staleness.setting()}
    return vars(unit) | known | facts | {"as_expected": True} | changes


def test_a_run_on_record_is_not_repeated_and_the_page_has_one_line_for_all_seeds(
    staleness, tmp_path, monkeypatch
):
    records = [record_of(staleness, seed, after) for seed, after in ((1, 0.7), (0, 0.9))]
    records += [record_of(staleness, 0, 0.5, control=True)]
    assert staleness.is_of(records[1], staleness.Unit(way="simulated", max_staleness=4, steps=400))
    changed = staleness.Unit(way="simulated", max_staleness=4, steps=400, corrected=True)
    assert not staleness.is_of(records[1], changed)
    page, file = tmp_path / "page.md", tmp_path / "records.json"
    page.write_text(f"before\n{staleness.MARK}\nold\n{staleness.MARK}\nafter\n")
    file.write_text(json.dumps({"runs": records}))
    monkeypatch.setattr(sys, "argv", ["staleness.py", "--output", str(file), "--page", str(page)])
    assert staleness.main() == 0
    text = page.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert "| 0.500 | 0.900 ± 0.020, 0.700 ± 0.020 | 2 of 2 |" in text
    assert "rewards shuffled" in text and "| 0 of 1 |" in text
