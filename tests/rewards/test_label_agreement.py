"""A reward is compared with a person's grades: numbers that can be checked by hand, identities."""

import json
import random
from itertools import combinations

import numpy as np
import pytest

from textpolicy.cli import main
from textpolicy.errors import ConfigError
from textpolicy.rewards.label_agreement import compare_with_labels


def graded(labels, rewards, prompts=None):
    """Return rows with these labels, whose answers are the rewards that `read` gives them."""
    prompts = prompts or [f"p{n}" for n in range(len(labels))]
    pairs = zip(prompts, labels, rewards, strict=True)
    return [{"prompt": p, "completion": str(r), "label": label} for p, label, r in pairs]


def read(completion):
    return None if completion == "None" else float(completion)


def test_the_numbers_can_be_checked_by_hand():
    found = compare_with_labels(read, graded([0, 0.5, 1, 1], [0.1, 0.4, 0.3, 0.9]))
    pairs = found.all_pairs
    assert (pairs.pairs, pairs.alike, pairs.equal, pairs.share) == (5, 4, 0, 0.8)
    # The ranks are 1, 2, 3.5, 3.5 and 1, 3, 2, 4.
    assert found.rank_correlation == pytest.approx(3 / (4.5 * 5) ** 0.5)
    assert found.mean_rewards == pytest.approx({0: 0.1, 0.5: 0.4, 1: 0.6})
    assert [one.row for one in found.disagreements] == [2, 1, 3]
    assert found.within_prompts is None


def test_the_share_is_that_of_counting_pair_by_pair():
    draw = random.Random(3)
    labels = [draw.randrange(4) for _ in range(30)]
    rewards = [draw.randrange(5) / 4 for _ in range(30)]
    prompts = [f"p{draw.randrange(6)}" for _ in range(30)]
    found = compare_with_labels(read, graded(labels, rewards, prompts))

    def share(pairs):
        points = [
            0.5 if rewards[a] == rewards[b] else float((rewards[a] > rewards[b]) == (x > y))
            for a, b in pairs
            if (x := labels[a]) != (y := labels[b])
        ]
        return np.mean(points)

    every = list(combinations(range(30), 2))
    assert found.all_pairs.share == pytest.approx(share(every))
    same = [(a, b) for a, b in every if prompts[a] == prompts[b]]
    assert found.within_prompts and found.within_prompts.share == pytest.approx(share(same))


def test_only_the_order_of_grades_counts_and_the_opposite_order_is_the_opposite():
    labels = list(range(1, 21))
    for scale in (lambda x: x, lambda x: x**3 / 7, lambda x: -1 / x):
        found = compare_with_labels(read, graded(labels, list(map(scale, labels))))
        assert found.all_pairs.share == found.rank_correlation == 1
        assert found.verdict == "agrees" and found.disagreements == []
    turned = compare_with_labels(read, graded(labels, labels[::-1]))
    assert turned.all_pairs.share == 0 and turned.rank_correlation == pytest.approx(-1)
    assert turned.verdict == "disagrees"
    few = compare_with_labels(read, graded(labels[:19], labels[:19]))
    assert few.all_pairs.low == 1 and few.verdict == "unclear"


def test_a_judge_that_likes_everything_is_as_good_as_a_guess():
    found = compare_with_labels(read, graded([0, 1, 2, 3], [0.9] * 4))
    assert found.all_pairs.equal == found.all_pairs.pairs == 6
    assert found.all_pairs.share == 0.5 and found.rank_correlation is None
    assert found.verdict == "unclear"


def test_the_interval_holds_the_share_of_a_guess_in_most_experiments():
    draw = np.random.default_rng(5)
    held = 0
    for _ in range(20):
        rows = graded(draw.integers(0, 2, 30).tolist(), draw.random(30).tolist())
        pairs = compare_with_labels(read, rows).all_pairs
        held += pairs.low <= 0.5 <= pairs.high
    assert 17 <= held <= 20


def test_grades_may_be_words_or_missing_and_answers_without_a_reward_are_counted():
    rows = graded([True, "no", "0", " 1 ", None, ""], [0.9, 0.2, "None", 0.8, 0, 0])
    found = compare_with_labels(read, rows)
    assert [one.label for one in found.answers] == [1, 0, 1]
    assert (found.without_label, found.without_reward) == (2, 1)
    assert "not graded        2 rows" in str(found) and "no reward         1 answers" in str(found)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "completion": "1"}], "no column 'label' of your grades; the rows have"),
        (graded(["good", "bad"], [1, 0]), "row 0 has the grade 'good' in the column 'label'"),
        (graded([1, 1], [1, 0]), "has 2 grades, and no two that differ"),
        ([{"prompt": "p", "label": 1, "reply": "1"}], "no column 'completion' with the graded"),
        (graded([1, 0], ["None", 1]), "1 of 2 graded answers have a reward"),
        (graded([1, 0], ["x", 1]), "could not convert string to float"),
    ],
)
def test_rows_that_cannot_be_compared_are_errors_that_say_why(rows, message):
    with pytest.raises(ConfigError, match=message):
        compare_with_labels(read, rows)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write rows that a person has graded, a reward that agrees, and one that does not."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"question": f"{n}+{n}=", "reply": reply, "grade": grade}
        for n in range(10)
        for reply, grade in ((f"It is {2 * n}", "yes"), (f"It is {2 * n + 1} or so", "no"))
    ]
    (tmp_path / "graded.jsonl").write_text(
        "\n".join(map(json.dumps, [*rows, {**rows[0], "grade": ""}]))
    )
    (tmp_path / "mine.py").write_text(
        "def brief(completion): return -len(completion)\n"
        "def long(completion): return len(completion)\n"
    )
    return ["--data", "graded.jsonl", "--columns", "completion=reply", "--label-column", "grade"]


def test_the_command_shows_the_agreement_and_the_answers_to_read(files, capsys):
    assert main(["check", "mine.py:brief", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "reward brief on 20 answers that you have graded"
    assert lines[1].startswith("  agreement         1.00, 95 % interval 1.00 to 1.00: of 100 pairs")
    assert lines[2].startswith("  within prompts    1.00, 95 % interval 1.00 to 1.00: of 10 pairs")
    assert lines[4:7] == [
        "  your grade 0      mean reward -13.50 of 10 answers",
        "  your grade 1      mean reward -7.50 of 10 answers",
        "  not graded        1 rows, which are left out",
    ]
    assert lines[8].startswith("agrees: the reward prefers what you prefer")
    assert lines[10].startswith("row ") and lines[11].startswith("  prompt  ")
    assert main(["check", "mine.py:long", *files, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "disagrees" and found["all_pairs"]["share"] == 0
    assert main(["check", "mine.py:long", *files, "--rows", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "unclear" and len(found["answers"]) == 6


@pytest.mark.parametrize("more", [["--env", "add"], ["--sample", "2"]])
def test_the_command_says_what_goes_with_grades(files, more, capsys):
    assert main(["check", "mine.py:brief", *files, *more]) == 2
    assert "takes neither --env nor --sample" in capsys.readouterr().err
