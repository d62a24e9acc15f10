"""The report of a run shows the content of its files, and executes none of it."""

import itertools
import json
import math
import re

import pytest

from tests.browser import CHROMIUM, browsing
from textpolicy.cli import main
from textpolicy.errors import DataError
from textpolicy.tracking.jsonl import RunFiles, read_rows
from textpolicy.tracking.report import write_report
from textpolicy.tracking.report.charts import charts_for
from textpolicy.tracking.report.page import SAMPLE_BYTES
from textpolicy.tracking.report.runs import MAX_TEXT_CHARACTERS, choose_samples

NASTY = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
    "<b>&amp;</b>\x1b[31mred\x07\u202etxt\ud800 {{SCRIPT}} javascript:0 ${1+1}\r\u2028"
)
CONFIG = '[task]\nenv = "add"\n[trainer]\nlr = {}\n[algorithm]\n'


def make_run(folder, *, steps=40, lr="0.1", supervised=False, text="935"):
    """Write a run with every kind of content."""
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(CONFIG.format(lr))
    files = RunFiles(folder / "metrics.jsonl", None if supervised else folder / "samples.jsonl")
    for step in range(steps):
        if supervised:
            files.write(step, {"loss": 3 / (step + 1), "learning_rate": 0.1})
            if step % 10 == 0:
                files.write(step, {"validation/loss": 4 / (step + 1)})
            continue
        files.write_samples(step, [sample(step, g, m, text) for g in range(2) for m in range(4)])
        files.write(step, metrics(step))
    files.write(steps, {"loss": 0.5} if supervised else {"version": float(steps)})
    files.close()
    return folder


def metrics(step):
    row = {"reward": step / 40, "reward_std": 0.25, "entropy": 1.0 - step / 100, "loss": 0.1}
    row |= {"completions/mean_length": 10.0, "completions/min_length": 4.0}
    row |= {"completions/max_length": 20.0, "kl": math.nan if step == 3 else 0.01 * step}
    row |= {"time/generate": 0.5, "time/update": 0.25, "time/step": 0.8, "my/own": 7.0 * step}
    row |= {"clip_ratio/low_mean": 0.0, "alarm/reward": float(step > 30)}
    return row | ({"eval/reward": 0.5, "eval/standard_error": 0.1} if step % 10 == 0 else {})


def sample(step, group, member, text):
    return {
        **{"step": step, "group": group, "member": member, "task": "add/0", "version": step},
        **{"prompt": f"{group}+{step}=", "completion": text if member else "alone", "tokens": 4},
        **{"reward": member / 4, "rewards": {"right": member / 4}, "advantage": 0.5},
        "metrics": {"exact": member / 8},
        "stop_reason": "length" if member == 3 else "stop_token",
    }


def data_in(page):
    text = page.read_text()
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1]
    )


@pytest.fixture(scope="module")
def new_page(tmp_path_factory):
    """Return a function that opens an empty page, in one browser for all tests."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with browsing(tmp_path_factory.mktemp("browser")) as open_page:
        yield open_page


@pytest.fixture
def page(new_page):
    opened = new_page()
    yield opened
    assert opened.problems == []
    assert opened.run("violations") == []


@pytest.mark.proves("S11")
def test_the_report_is_one_file_in_the_run_that_loads_nothing(tmp_path):
    path = write_report([make_run(tmp_path / "run")])
    assert path == tmp_path / "run" / "report.html"
    text = path.read_text()
    assert set(re.findall(r"https?://[^\"')\s]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<link|<iframe|<img|\bimport\b|@import|url\(|\son\w+=", text)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_curves_have_every_finite_value_of_the_metrics_file(tmp_path):
    (run,) = data_in(write_report([make_run(tmp_path / "run")]))["runs"]
    assert run["metrics"]["reward"] == [[step, step / 40] for step in range(40)]
    assert [step for step, _ in run["metrics"]["kl"]] == [s for s in range(40) if s != 3]
    assert [step for step, _ in run["metrics"]["eval/reward"]] == [0, 10, 20, 30]
    facts = dict(run["facts"])
    assert (facts["task"], facts["steps"]) == ("add", "40")
    assert facts["reward"] == "0.0375 → 0.938"
    assert facts["alarm: reward"] == "at step 31"
    assert "loss" not in facts


@pytest.mark.parametrize("steps", [20, 500])
def test_parts_of_time_that_a_step_lacks_are_0_in_the_stack(tmp_path, steps):
    files = RunFiles(tmp_path / "metrics.jsonl")
    for step in range(steps):
        row = {"reward": 1.0, "time/step": 3.0, "time/generate": 2.0}
        row |= {"time/checkpoint": 1.0} if step else {"time/evaluate": 8.0}
        files.write(step, row)
    # The last evaluation belongs to no step.
    files.write(steps, {"version": 1.0, "time/evaluate": 8.0})
    files.close()
    (run,) = data_in(write_report([tmp_path]))["runs"]
    parts = [
        dict(run["metrics"][f"time/{name}"]) for name in ("generate", "checkpoint", "evaluate")
    ]
    assert parts[0].keys() == parts[1].keys() == parts[2].keys()
    first, *_, last = parts[0]
    stretch = 1 if steps == 20 else 2
    assert [part[last] for part in parts] == [2, 1, 0]
    assert [part[first] for part in parts] == [2, 1 - 1 / stretch, 8 / stretch]


def test_a_run_with_workers_says_who_waited_for_whom_and_another_run_does_not(tmp_path):
    (plain,) = data_in(write_report([make_run(tmp_path / "plain")]))["runs"]
    files = RunFiles(tmp_path / "metrics.jsonl")
    for step in range(4):
        # The workers start in the first step.
        row = {"reward": 1.0, "time/step": 4.0, "time/wait": 1.0 if step else 4.0}
        row["trainer/idle"] = row["time/wait"] / 4.0
        row |= {"workers/idle": 0.1 * step, "buffer/dropped": float(step == 3) * 2}
        files.write(step, row)
    files.close()
    data = data_in(write_report([tmp_path]))
    facts = dict(data["runs"][0]["facts"])
    assert facts["waited for the other"] == "trainer 25%, workers 20% of the time"
    assert facts["groups dropped as too stale"] == "2"
    (chart,) = [chart for chart in data["charts"] if chart["title"] == "Who waited for whom"]
    assert [line["metric"] for line in chart["lines"]] == ["trainer/idle", "workers/idle"]
    assert not chart["more"]
    assert not {"waited for the other", "groups dropped as too stale"} & dict(plain["facts"]).keys()
    assert "wait" not in json.dumps(charts_for(dict.fromkeys(plain["metrics"], True)))


@pytest.mark.slow
def test_a_long_run_is_drawn_by_means_and_its_samples_are_spread_over_it(tmp_path):
    folder = make_run(tmp_path / "run", steps=500)
    (run,) = data_in(write_report([folder]))["runs"]
    assert len(run["metrics"]["reward"]) == 250
    assert run["metrics"]["reward"][0] == [1, 0.0125]
    steps = sorted({row["step"] for row in run["samples"]})
    assert len(steps) == 60
    assert (steps[0], steps[-1]) == (0, 499)
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 9
    assert run["samples_total"] == 4000


def test_samples_are_whole_groups_within_the_limit_of_bytes(tmp_path):
    folder = make_run(tmp_path / "run", text="x" * (MAX_TEXT_CHARACTERS + 5))
    rows, total = choose_samples(folder / "samples.jsonl", 400_000)
    assert total == 320
    assert 300_000 < len(json.dumps(rows)) <= 400_000
    groups = [(row["step"], row["group"]) for row in rows]
    assert all(groups.count(key) == 4 for key in set(groups))
    cut = [row["completion"] for row in rows if row["member"]]
    assert all(text.endswith("[5 characters more in samples.jsonl]") for text in cut)


def test_the_page_of_several_runs_leaves_the_page_of_the_first_run_as_it_is(tmp_path, capsys):
    runs = [make_run(tmp_path / name, steps=2) for name in "abc"]
    own = write_report(runs[:1])
    before = own.read_bytes()
    assert main(["report", *map(str, runs)]) == 0
    page = tmp_path / "a" / "compare-b-c.html"
    assert capsys.readouterr().out.strip() == str(page)
    assert [run["name"] for run in data_in(page)["runs"]] == ["a", "b", "c"]
    assert own.read_bytes() == before
    page.write_text("mine")
    assert main(["report", *map(str, runs)]) == 2
    assert "compare-b-c.html is not a report that textpolicy wrote" in capsys.readouterr().err
    assert page.read_text() == "mine"


@pytest.mark.slow
def test_a_report_of_several_runs_stays_at_a_few_megabytes(tmp_path):
    runs = [make_run(tmp_path / name, text="y" * 4000) for name in "abc"]
    path = write_report(runs, tmp_path / "all.html")
    assert path.stat().st_size < SAMPLE_BYTES + 300_000
    assert all(run["samples"] for run in data_in(path)["runs"])


def test_every_metric_with_data_has_a_chart():
    alive = {"reward": True, "reward_std": True, "kl": False, "my/own": True, "version": True}
    charts = charts_for(alive)
    assert [(chart["title"], chart["more"]) for chart in charts] == [
        ("Reward", False),
        ("KL divergence", True),
        ("my/own", True),
    ]
    assert [c["title"] for c in charts_for({"loss": True, "validation/loss": True})] == ["Loss"]
    several = charts_for(dict.fromkeys(["rewards/a/mean", "rewards/a/std", "rewards/b/mean"], True))
    assert [line["label"] for line in several[0]["lines"]] == ["a", "b"]
    evaluated = charts_for(dict.fromkeys(["eval/reward", "eval/pass@4", "eval/sort/reward"], True))
    assert [chart["title"] for chart in evaluated] == ["Evaluation", "Evaluation of sort"]


def test_a_number_of_a_reward_has_one_chart_under_its_short_name():
    key = "rewards/reward/exact"
    error = "eval/standard_errors/reward/exact"
    names = ["reward", "rewards/reward/mean", "rewards/reward/std", key, f"eval/{key}", error]
    main_charts = [chart for chart in charts_for(dict.fromkeys(names, True)) if not chart["more"]]
    assert [chart["title"] for chart in main_charts] == ["Reward", "exact"]
    assert [(line["metric"], line["spread"]) for line in main_charts[1]["lines"]] == [
        (key, None),
        (f"eval/{key}", error),
    ]
    # A run may be measured on another reward than it is trained on.
    held_out = charts_for(dict.fromkeys([f"eval/{key}", error], True))
    assert [chart["title"] for chart in held_out] == ["exact"]


def test_each_of_several_rewards_has_one_chart_with_its_values_on_held_out_tasks():
    names = [f"{where}rewards/{name}/mean" for where in ("", "eval/") for name in ("form", "right")]
    names += [f"eval/standard_errors/{name}/mean" for name in ("form", "right")]
    charts = charts_for(dict.fromkeys(names, True))
    shown = [(chart["title"], [line["metric"] for line in chart["lines"]]) for chart in charts]
    assert ("right", ["rewards/right/mean", "eval/rewards/right/mean"]) in shown
    assert not any(chart["more"] for chart in charts)


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(DataError, match=r"has no metrics\.jsonl; expected the directory of a run"):
        write_report([tmp_path])
    assert main(["report", str(tmp_path)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err


def test_the_command_writes_to_the_given_path_and_prints_the_path(tmp_path, capsys):
    run, page = make_run(tmp_path / "run"), tmp_path / "page.html"
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert main(["report", str(run), str(run), "--output", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(page)}
    assert len(data_in(page)["runs"]) == 2


@pytest.mark.slow
def test_the_page_draws_its_curves_and_smooths_them(tmp_path, page):
    page.open(write_report([make_run(tmp_path / "run")]))
    titles = page.run("[...document.querySelectorAll('#charts .chart')].map(c => c.dataset.title)")
    assert titles == [
        "Reward",
        "Evaluation",
        "Length",
        "Entropy",
        "KL divergence",
        "Time in a step",
    ]
    first = "document.querySelector('[data-title=Reward] path.line').getAttribute('d')"
    assert len(re.findall("[ML]", page.run(first))) == 40
    assert page.run("document.querySelectorAll('[data-title=Reward] .band').length") == 1
    assert page.run("document.querySelectorAll('[data-title^=Time] .area').length") == 2
    more = page.run("[...document.querySelectorAll('#more .chart')].map(c => c.dataset.title)")
    assert more == ["Clipping", "loss", "my/own"]
    before = page.run(first)
    page.run("smoothing.value = 0.9; smoothing.dispatchEvent(new Event('input'))")
    assert (
        page.run(
            "document.querySelector('[data-title=Reward] path.line:not(.raw)').getAttribute('d')"
        )
        != before
    )
    assert page.run(first.replace("path.line", "path.raw")) == before


@pytest.mark.slow
def test_samples_are_filtered_by_step_reward_end_and_words(tmp_path, page):
    page.open(write_report([make_run(tmp_path / "run")]))
    count = "document.querySelectorAll('.member').length"
    found = "document.getElementById('found').value"

    def choose(**values):
        for name, value in values.items():
            page.run(f"filters.elements.{name}.value = {json.dumps(value)}")
        page.run("filters.dispatchEvent(new Event('input'))")

    assert page.run(found) == "320 of 320"
    assert page.run("document.querySelectorAll('article').length") == 10
    choose(step="7")
    assert page.run(count) == 8
    assert page.run("[...document.querySelectorAll('.prompt')].map(p => p.textContent)") == [
        "0+7=",
        "1+7=",
    ]
    choose(least="0.5")
    assert page.run(count) == 4
    choose(most="0.5")
    assert page.run(count) == 2
    choose(least="", most="", stop="length")
    assert page.run(count) == 2
    choose(stop="", text="ALONE")
    assert page.run(count) == 2
    choose(step="", text="1+39=", order="last")
    assert page.run(count) == 4
    choose(text="nowhere")
    assert page.run(found) == "0 of 320"


@pytest.mark.slow
def test_keys_move_along_the_curves_and_open_the_samples_of_a_step(tmp_path, page):
    page.open(write_report([make_run(tmp_path / "run")]))
    page.run("document.querySelector('[data-title=Reward] svg').focus()")
    for key in ("Home", "ArrowRight", "ArrowRight"):
        page.press(key)
    legend = "document.querySelector('[data-title=Reward] .legend').textContent"
    assert page.run(legend) == "mean reward 0.05step 2"
    page.press("Enter")
    assert page.run("filters.elements.step.value") == "2"
    assert page.run("document.querySelectorAll('article').length") == 2


@pytest.mark.proves("S11")
@pytest.mark.slow
def test_hostile_text_is_shown_as_text_and_not_executed(tmp_path, page):
    folder = make_run(tmp_path / "<b>run", text=NASTY, steps=2)
    known = next(row for row in read_rows(folder / "samples.jsonl") if row["member"] == 1)
    assert known["completion"] == NASTY
    page.open(write_report([folder]))
    assert page.run("document.title") == "<b>run"
    shown = page.run("document.querySelector('.member pre').textContent")
    spelled = NASTY.replace("\x1b", "\\x1b").replace("\x07", "\\x07").replace("\u202e", "\\u202e")
    spelled = (
        spelled.replace("\ud800", "\\ud800").replace("\r", "\\x0d").replace("\u2028", "\u2028")
    )
    assert shown == spelled
    assert (
        page.run("document.querySelectorAll('img, main script, main b:not([class]) > *').length")
        == 0
    )


@pytest.mark.slow
def test_several_runs_share_a_chart_and_can_be_hidden(tmp_path, page):
    runs = [make_run(tmp_path / name, lr=lr) for name, lr in (("a", "0.1"), ("b", "0.2"))]
    page.open(write_report(runs, tmp_path / "both.html"))
    lines = "document.querySelectorAll('[data-title=Reward] path.line').length"
    drawn = "document.querySelectorAll('[data-title=Reward] > svg path.line').length"
    assert page.run(lines) == 4
    assert page.run(drawn) == 2
    page.run("document.querySelector('#runs input').click()")
    assert page.run(drawn) == 1
    differing = "[...document.querySelectorAll('td.differs')].map(cell => cell.textContent)"
    assert page.run(differing) == ["0.1", "0.2"]
    page.run("filters.elements.run.value = '1'; filters.dispatchEvent(new Event('input'))")
    assert page.run("document.getElementById('found').value") == "320 of 640"


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_does_not_scroll_sideways_and_the_page_follows_light_and_dark(tmp_path, page, dark):
    folder = make_run(tmp_path / ("long-name-" * 12), text="unbroken" * 400)
    page.open(write_report([folder]), width=360, height=740, dark=dark)
    page.run("document.querySelector('details').open = true")
    assert page.run("document.documentElement.scrollWidth") == 360
    (red, *_) = re.findall(r"\d+", page.run("getComputedStyle(document.body).backgroundColor"))
    assert (int(red) < 60) is dark


@pytest.mark.slow
def test_a_supervised_run_shows_its_losses(tmp_path, page):
    page.open(write_report([make_run(tmp_path / "run", supervised=True)]))
    titles = page.run("[...document.querySelectorAll('#charts .chart')].map(c => c.dataset.title)")
    assert titles == ["Loss", "Learning rate"]
    assert page.run("document.querySelectorAll('[data-title=Loss] > svg path.line').length") == 2
    assert page.run("document.getElementById('samples')") is None
