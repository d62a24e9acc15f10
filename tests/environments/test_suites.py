"""Public suites as environments: their layouts, their graders, and what is not in their layout."""

import json
from itertools import islice

import pytest

from tests.environments.layouts import SUITES, sums, write_jsonl, write_parquet
from textpolicy.cli import main
from textpolicy.environments import check_env, load, load_rows
from textpolicy.environments.data_source import DataSource
from textpolicy.errors import DataError, RewardError
from textpolicy.rewards import score


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    """Return the file of each suite, as parquet."""
    folder = tmp_path_factory.mktemp("suites")
    return {name: write_parquet(folder / f"{name}.parquet", SUITES[name]) for name in SUITES}


def scored(environment, row, completion):
    return score(environment.reward, "", completion, row)


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_keeps_the_contract_of_environments(suites, name):
    environment = load(name, suites[name])
    check_env(environment, 20)
    held_out = {task.prompt for task in environment.heldout(100)}
    trained = {task.prompt for task in islice(environment.stream(0), 100)}
    assert held_out and trained and not held_out & trained


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_read_from_lines_of_json_and_as_a_stream(suites, tmp_path, name):
    lines = write_jsonl(tmp_path / "rows.jsonl", SUITES[name])
    whole = {str(task.prompt): task for task in load(name, lines).tasks.train}
    stream = load(name, DataSource(train=suites[name], stream=True)).stream(0)
    prompts = {str(task.prompt) for task in islice(stream, 20)}
    assert prompts & whole.keys()


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (r"so it is \boxed{\frac{3}{2}}", 1),
        (r"\boxed{1.5}", 1),
        (r"first \boxed{2}, no: \boxed{6/4}", 1),
        (r"\boxed{\frac{2}{3}}", 0),
        (r"\boxed{3}", 0),
        (r"<think>\boxed{\frac32}</think>", 0),
        ("", 0),
    ],
)
def test_answers_of_math500_are_judged_by_their_value(suites, completion, reward):
    row = {"problem": "?", "answer": r"\frac{3}{2}"}
    environment = load("math500", suites["math500"])
    assert scored(environment, row, completion) == reward
    solved = {"problem": "?", "solution": r"\boxed{1}, but no: \boxed{\frac{3}{2}}"}
    assert scored(environment, solved, completion) == reward


@pytest.mark.parametrize(
    ("problem", "right", "copy"),
    [
        ("What is $2^{10} + 7$?", "1031", "2^{10}+7"),
        (r"Compute $\dbinom{8}{4}$.", "70", r"\binom{8}{4}"),
        (r"What is $\sin 30^\circ$?", "0.5", r"\sin 30^\circ"),
        (r"Simplify $\sqrt{180}$.", r"6\sqrt5", r"\sqrt{180}"),
    ],
)
def test_a_copied_expression_of_a_problem_of_math500_earns_nothing(suites, problem, right, copy):
    environment = load("math500", suites["math500"])
    row = {"problem": problem, "answer": right}
    for text in (rf"\boxed{{{copy}}}", f"The answer is {copy}."):
        assert scored(environment, row, text) == 0
        assert scored(environment, row | {"problem": "Another."}, text) == 1
    for text in (rf"\boxed{{{right}}}", rf"\boxed{{{copy} = {right}}}"):
        assert scored(environment, row, text) == 1


def test_an_answer_that_a_problem_of_math500_offers_may_be_copied(suites):
    environment = load("math500", suites["math500"])
    problem = r"Which is larger, $\frac{1}{2}$ or $\frac{2}{3}$? Is it 2/3, or $x-1$?"
    for right, given in ((r"\frac{2}{3}", "2/3"), ("2/3", r"\frac{2}{3}"), ("x-1", "x - 1")):
        assert scored(environment, {"problem": problem, "answer": right}, given) == 1


def test_a_row_of_math500_without_an_answer_is_an_error_with_its_columns(suites):
    environment = load("math500", suites["math500"])
    with pytest.raises(RewardError, match=r"no right answer: its columns are \['problem'\]"):
        scored(environment, {"problem": "?"}, r"\boxed{1}")


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("First 7*11 is 77. <answer>7*11-2</answer>", 1),
        ("<answer>1</answer> no, <answer>(11 * 7) - 2</answer>.", 1),
        ("<answer>7*11-2 = 75</answer>", 0),
        ("<answer>70+5</answer>", 0),
        ("<answer>7*11-2", 0),
        ("7*11-2", 0),
        ("<answer>7*11-2+0*2</answer>", 0),
        ("<think><answer>7*11-2</answer></think>75", 0),
        ("<answer></answer>", 0),
        ("<answer>" + "(" * 9000 + "</answer>", 0),
        ("<answer>9**9**9**9</answer>", 0),
    ],
)
def test_expressions_of_countdown34_are_computed(suites, completion, reward):
    environment = load("countdown34", suites["countdown34"])
    assert scored(environment, {"nums": [7, 11, 2], "target": 75}, completion) == reward


def test_gold_answers_of_countdown34_need_parentheses_and_quotients(suites):
    environment = load("countdown34", suites["countdown34"])
    assert environment.gold
    for nums, target in (([3, 3, 8, 8], 24), ([5, 5, 5, 1], 24), ([2, 4, 4, 8], 9)):
        row = {"nums": nums, "target": target}
        assert scored(environment, row, environment.gold(row)) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"nums": [1, 2], "target": 2.5}, "target is 2.5; expected a whole number"),
        ({"nums": list(range(9)), "target": 3}, "expected a list of at most 4 whole numbers"),
        ({"nums": [1, "2"], "target": 3}, r"nums is \[1, '2'\]"),
        ({"numbers": [1, 2], "target": 3}, "nums is None"),
        ({"nums": [True, 2], "target": 3}, r"nums is \[True, 2\]"),
    ],
)
def test_rows_that_are_no_countdown_are_refused_by_line(tmp_path, row, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [*SUITES["countdown34"], row])
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 39: no prompt .*{message}"):
        load("countdown34", path)


def test_ifeval_reports_strict_and_loose_accuracy_of_prompts_and_instructions(suites):
    row = load_rows(suites["ifeval"])[0]
    environment = load("ifeval", suites["ifeval"])
    wanted = {
        "A red kite": (1, 1, 3, 3),
        "A red kite flies above all of us": (0, 0, 2, 2),
        "Sure, of course:\nA red kite": (0, 1, 1, 3),
        "": (0, 0, 0, 0),
        "<think>A kite, yes</think>A red kite": (1, 1, 3, 3),
    }
    for completion, numbers in wanted.items():
        found = environment.reward(row["prompt"], completion.rpartition("</think>")[2], row)
        names = ("prompt_strict", "prompt_loose", "followed_strict", "followed_loose")
        assert found.metrics == dict(zip(names, numbers, strict=True)) | {"instructions": 3}
        assert found.value == numbers[0] == scored(environment, row, completion)


def test_rows_whose_instructions_are_unknown_are_refused_by_line(tmp_path):
    row = SUITES["ifeval"][0] | {"instruction_id_list": ["a:b"], "kwargs": [{}], "prompt": "new"}
    path = write_jsonl(tmp_path / "rows.jsonl", [*SUITES["ifeval"], row])
    with pytest.raises(DataError, match=r"rows\.jsonl, line 41: .*no instruction 'a:b'; known: "):
        load("ifeval", path)


def test_numbers_of_gsm8k_have_separators_as_in_the_published_rows(tmp_path):
    rows = [*sums(0, 9), {"question": "How much?", "answer": "It is <<9*200=1800>>.\n#### 1,800"}]
    environment = load("gsm8k", write_parquet(tmp_path / "rows.parquet", rows))
    row = {"answer": rows[-1]["answer"]}
    right = ["#### 1,800", "#### 1800", "#### $1800.00", "####1,800.", "x #### 7\n#### 1800 apples"]
    wrong = ["1800", "#### 18", "#### 1,80", "#### 1800 or 1801\n####", "#### 1.800"]
    assert [scored(environment, row, text) for text in right] == [1] * len(right)
    assert [scored(environment, row, text) for text in wrong] == [0] * len(wrong)


def test_suites_name_the_address_that_they_are_published_at(capsys):
    assert main(["envs", "--json"]) == 0
    ready = json.loads(capsys.readouterr().out)["ready"]
    assert SUITES.keys() <= ready.keys()
    note = load("gsm8k").split_note
    assert "12 rows of its own" in note and "--data hf:openai/gsm8k:main:train" in note


@pytest.mark.slow
def test_the_command_measures_and_trains_on_a_suite(suites, tmp_path, capsys):
    small = ("--max-tokens", "4", "--json")
    rows = ("--env", "ifeval", "--eval-data", str(suites["ifeval"]))
    assert main(["eval", *rows, "--count", "4", *small]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    metrics = found["metrics"]["base"]
    assert metrics["rewards/ifeval/instructions"] == 3
    assert metrics["rewards/ifeval/prompt_strict"] == metrics["reward"]
    rows = ("--env", "math500", "--data", str(suites["math500"]), "--output", str(tmp_path / "r"))
    steps = ("--steps", "1", "--groups-per-step", "1", "--group-size", "2", "--count", "2")
    assert main(["train", *rows, *steps, *small]) == 0
