"""Environments from files, rows and ids, and the errors for wrong files and options."""

import json
from itertools import islice
from pathlib import Path

import gymnasium as gym
import pytest

from textpolicy.cli import main
from textpolicy.environments import AnyText, check_env, from_gymnasium, gold_answers, load
from textpolicy.errors import TaskError
from textpolicy.generation.scripted import ScriptedPolicy
from textpolicy.rollout.worker import collect

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "first_scores.json"
SINGLE = """
def make(rng):
    number = rng.randint(0, 999)
    return f"echo {number}", {"number": number}


def gold(example):
    return str(example["number"])


def reward(prompt, completion, example):
    return float(completion.strip() == gold(example))
"""
CHAT = (
    SINGLE
    + """
MAX_TURNS = 3


def reply(completions, example):
    return None if len(completions) == 2 else "again"


def turn_reward(completions, example):
    return 0.5
"""
)
TOOLS = '''
CALLS = "written"
ROWS = [{"question": f"{n}", "answer": f"{n * n}"} for n in range(40)]
PROMPT = "square({question})?"


def square(n: int) -> int:
    """The number times itself."""
    return n * n


TOOLS = [square]


def gold(example):
    return [f"square({example['question']})", example["answer"]]


def reward(completion, answer):
    return float(completion == answer)
'''
CLASS = '''
import gymnasium as gym
from gymnasium.spaces import Text

MAX_TOKENS = 7


class Parity(gym.Env):
    """Says whether a number is even, three times."""

    observation_space = Text(20)
    action_space = Text(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 3
        return self._ask()

    def step(self, action):
        self.left -= 1
        right = action == self.answer
        observation, info = self._ask()
        return observation, float(right), self.left == 0, False, info

    def _ask(self):
        number = int(self.np_random.integers(1000))
        self.answer = "odd" if number % 2 else "even"
        return str(number), {"gold": self.answer}
'''


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    ("text", "turns", "reward"),
    [(SINGLE, 0, 1.0), (CHAT, 2, 2.0), (TOOLS, 2, 1.0), (CLASS, 3, 3.0)],
    ids=["one turn", "chat", "tools", "gymnasium class"],
)
def test_one_file_in_any_folder_is_an_environment(write, load_tiny, text, turns, reward):
    environment = load(write(text))
    check_env(environment, 20)
    tasks = list(islice(environment.stream(0), 4))
    script = [gold_answers(environment, task) for task in tasks]
    policy = ScriptedPolicy(load_tiny()[1], script)
    for group in collect(tasks, policy, environment.reward, group_size=2, seed=0):
        for rollout in group.rollouts:
            assert len(rollout.turns) == turns
            assert rollout.reward == reward


def test_a_class_of_a_file_can_be_named(write):
    assert load(f"{write(CLASS)}:Parity").max_tokens == 7
    with pytest.raises(
        TaskError,
        match=r"no environment 'Partiy'.*Its subclasses of gymnasium\.Env are \['Parity'\]",
    ):
        load(f"{write(CLASS)}:Partiy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"neither make\(rng\) and reward.*nor one subclass of gymnasium\.Env"),
        ("def make(rng): ...", r"has no reward\(prompt, completion, example\)"),
        (TOOLS.replace("n: int", "n"), r"parameter 'n' has no annotation"),
        (TOOLS.replace("ROWS =", "OTHER ="), r"has no rows of its own\. Name a file of rows"),
        (TOOLS.replace('"written"', '"writen"'), r"CALLS is 'writen'; expected one of"),
    ],
)
def test_a_file_that_holds_no_environment_says_what_is_missing(write, text, message):
    with pytest.raises(TaskError, match=message):
        load(write(text)).make()


class Endless(gym.Env):
    """Never ends."""

    observation_space = AnyText()
    action_space = AnyText()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "x", {}

    def step(self, action):
        return "x", 0.0, False, False, {}


class Picky(Endless):
    """Raises an error on some answers."""

    def step(self, action):
        return "x", float(len("abc".split(action)) > 1), True, False, {}


class Forgetful(Endless):
    """Starts with another observation every time."""

    def reset(self, *, seed=None, options=None):
        return str(gym.utils.seeding.np_random()[0].integers(10**9)), {}


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (Endless, "continues after 200 turns; expected an end"),
        (Picky, "ValueError: empty separator"),
        (Forgetful, "gymnasium's check_env: AssertionError"),
    ],
)
def test_check_env_names_the_broken_part_of_the_contract(env, message):
    with pytest.raises(TaskError, match=message):
        check_env(from_gymnasium(env))


def test_an_environment_without_text_is_refused():
    with pytest.raises(
        TaskError, match=r"CartPole-v1, seed .* starts with .*ndarray\); expected text"
    ):
        load("gymnasium:CartPole-v1").heldout(1)
    with pytest.raises(TaskError, match=r"starts with .*ndarray\); expected text"):
        check_env(load("gymnasium:CartPole-v1"))


def test_every_string_is_in_the_space_and_samples_repeat():
    space = AnyText(seed=3)
    assert all(text in space for text in ("", "\n", "漢字", "x" * 10**6))
    assert 3 not in space
    again = AnyText(seed=3)
    assert [space.sample() for _ in range(9)] == [again.sample() for _ in range(9)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rows = [{"prompt": f"{n}+{n + 7}=", "answer": f"{2 * n + 7}"} for n in range(100, 140)]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "my_reward.py").write_text(
        "def reward(completion, answer):\n    return float(completion.strip() == answer)\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_rows_and_a_reward_train_from_an_empty_folder(folder, capsys):
    train = ["train", "--model", "tiny", "--data", "rows.jsonl", "--reward", "my_reward.py"]
    assert main([*train, "--steps", "2", "--group-size", "4", "--max-tokens", "6"]) == 0
    out = capsys.readouterr()
    assert "4 held-out tasks" in out.err
    assert "adapter: runs/rows/adapters/latest.safetensors" in out.out
    assert (folder / "runs" / "rows" / "adapters" / "latest.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no task is given"),
        (["--data", "rows.jsonl"], "rows.jsonl are given without a reward"),
        (["--data", "rows.jsonl", "--env", "sort"], "environment sort makes its tasks itself"),
        (
            ["--env", "sort", "--prompt", "{x}"],
            "the environment sort, which writes its prompts itself",
        ),
        (
            ["--data", "rows.jsonl", "--prompt", "{question}", "--reward", "my_reward.py"],
            "the prompt template names the column {question}, but the columns of the rows are "
            "['prompt', 'answer']",
        ),
    ],
)
def test_options_that_exclude_each_other_are_an_error_before_a_model_loads(
    folder, capsys, options, message
):
    assert main(["train", *options]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_word_problems_come_from_a_file(folder):
    row = {"question": "What is 600+600?", "answer": "600+600 = 1200\n#### 1,200"}
    lines = "".join(json.dumps(row | {"question": f"{n}: {row['question']}"}) + "\n" for n in "ab")
    (folder / "problems.jsonl").write_text(lines, encoding="utf-8")
    environment = load("gsm8k", "problems.jsonl")
    (task,) = environment.heldout(9)
    assert task.prompt.endswith("end with the number alone after ####.")
    scores = {"#### 1200": 1.0, "#### $1,200.00 in all": 1.0, "1200": 0.0, "#### 12": 0.0, "": 0.0}
    for completion, value in scores.items():
        assert environment.reward(task.prompt, completion, task.example) == value


def test_the_command_lists_every_environment_and_shows_one(capsys):
    assert main(["envs", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"add", "wordle", "calculator"} <= set(listed["ready"])
    assert set(listed["others"]) >= {"FILE.py[:NAME]", "textarena:NAME", "reasoning_gym:NAME"}
    assert main(["envs", "tictactoe", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["prompt"].startswith("You are X.")
    assert len(shown["gold"]) >= 3


def test_the_list_says_which_model_a_task_suits_with_its_recorded_score(capsys):
    assert main(["envs", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    shown = listed["first_scores"]
    assert all(scores.keys() <= listed["ready"].keys() for scores in shown.values())
    record = json.loads(RECORD.read_text("utf-8"))["models"]
    measured = [{one["env"]: round(one["greedy"], 2) for one in tasks} for tasks in record.values()]
    assert list(shown.values()) == measured
    # Neither too hard nor too easy before any training.
    assert all(0.05 <= score <= 0.8 for scores in measured for score in scores.values())
    assert main(["envs"]) == 0
    embedded, real, others, *_ = capsys.readouterr().out.split("\n\n")
    assert (
        "for the embedded model" in embedded and f"sort       {measured[0]['sort']:.2f}" in embedded
    )
    assert "SmolLM2-135M-Instruct" in real and f"letter        {measured[1]['letter']:.2f}" in real
    assert "\nwordle " in others and "\nletter " not in others
