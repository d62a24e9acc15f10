"""A system message and solved examples before each prompt, and which tasks are examples."""

import json

import pytest

from textpolicy.config.train import TaskOptions
from textpolicy.environments import Dataset, from_dataset, load
from textpolicy.environments.preamble import read_system, with_preamble
from textpolicy.errors import ConfigError, TaskError
from textpolicy.experiment.tasks import find_task
from textpolicy.rollout.worker import collect
from textpolicy.types import Task

ROWS = [{"question": f"{n}+{n}=", "solution": str(2 * n)} for n in range(1, 41)]


def reward(completion, example):
    return float(completion == example["solution"])


@pytest.fixture
def sums():
    return from_dataset(Dataset.from_rows(ROWS, "{question}"), reward)


def pairs(task):
    """Return the questions and answers in the preamble of a task."""
    texts = [message["content"] for message in task.preamble if message["role"] != "system"]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_examples_are_training_rows_with_their_answers_and_never_the_row_itself(sums):
    few = with_preamble(sums, few_shot=3, seed=1)
    train = {task.prompt for task in sums.tasks.train}
    held_out = {task.prompt for task in sums.tasks.held_out}
    used = set()
    for task in (*few.tasks.train, *few.heldout(100)):
        shown = pairs(task)
        assert len(shown) == 3 and len(set(shown)) == 3
        for question, answer in shown:
            assert question in train and question not in held_out
            assert question != task.prompt
            assert int(answer) == 2 * int(question.partition("+")[0])
        used |= set(shown)
    # The rows that are examples themselves have another one in their own place.
    assert len(used) == 4
    assert [task.prompt for task in few.tasks.train] == [task.prompt for task in sums.tasks.train]


def test_the_seed_decides_the_examples(sums):
    def shown(seed):
        return pairs(with_preamble(sums, few_shot=3, seed=seed).heldout(1)[0])

    assert shown(1) == shown(1)
    assert len({tuple(shown(seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize("name", ["add", "sort", "gsm8k", "countdown"])
def test_ready_environments_give_their_gold_answers_as_examples(name):
    plain = load(name)
    few = with_preamble(plain, few_shot=2, seed=0)
    held_out = {str(task.prompt) for task in plain.heldout(200)}
    stream = few.stream(0)
    for task in (*few.heldout(5), *(next(stream) for _ in range(20))):
        for question, _ in pairs(task):
            assert question != task.prompt and question not in held_out
    first = few.heldout(1)[0]
    assert [m["role"] for m in first.preamble] == ["user", "assistant"] * 2
    assert few.split_note == plain.split_note


def test_what_cannot_be_shown_as_an_example_is_refused(sums):
    with pytest.raises(TaskError, match="needs 41 different training tasks"):
        with_preamble(sums, few_shot=40, seed=0)
    with pytest.raises(TaskError, match="conversation of several turns"):
        with_preamble(load("hilo"), few_shot=1, seed=0)
    with pytest.raises(TaskError, match=r"Name the column of right answers \(--gold-column\)"):
        with_preamble(sums, few_shot=1, gold_column="gold", seed=0)
    shown = pairs(with_preamble(sums, few_shot=1, gold_column="question", seed=0).heldout(1)[0])
    assert shown[0][0] == shown[0][1]


def test_a_conversation_with_its_own_system_message_keeps_it():
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "?"}]
    before = [
        {"role": "system", "content": "Other."},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
    ]
    task = Task(id="t", prompt=own, preamble=before)
    assert [message["content"] for message in task.asked] == ["Own.", "1", "2", "?"]
    assert Task(id="t", prompt="?", preamble=before).asked[0] == before[0]
    assert Task(id="t", prompt="?").asked == "?"


def test_a_system_message_is_a_text_or_the_content_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules").write_text("Be brief.\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert read_system("rules") == "Be brief."
    for text in ("Be brief.", "a\nb", "x" * 5000, "x" * 900 + "/" + "y" * 90, "Read a.txt", "a\0"):
        assert read_system(text) == text
    assert read_system(None) is None and read_system("") is None
    for name in ("absent.txt", "notes/absent.md", "bad.txt"):
        with pytest.raises(ConfigError, match="the system message cannot be read"):
            read_system(name)


def test_episodes_and_rewards_read_the_system_message(tmp_path):
    class Echo:
        version = 0

        def __init__(self):
            self.asked = []

        def generate(self, prompts, *, n=1, seed=None):
            self.asked += prompts
            raise RuntimeError("asked")

        def converse(self, prompts, respond, *, n=1, seed=None):
            self.asked += prompts
            raise RuntimeError("asked")

        def reload(self, path):
            raise AssertionError

    for name in ("add", "hilo"):
        environment, rewards = find_task(TaskOptions(env=name, system="Be brief."), 0)
        (task,) = environment.heldout(1)
        policy = Echo()
        with pytest.raises(RuntimeError, match="asked"):
            collect([task], policy, rewards, group_size=1, seed=0)
        assert policy.asked[0][0] == {"role": "system", "content": "Be brief."}
        assert policy.asked[0][-1] == {"role": "user", "content": task.prompt}


def test_rows_of_a_file_have_examples_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "mine.py").write_text("def reward(completion, solution):\n    return 0.0\n")
    options = TaskOptions(
        data=str(path), prompt="{question}", reward=str(tmp_path / "mine.py"), few_shot=2
    )
    environment, _ = find_task(options, 3)
    assert len(pairs(environment.heldout(1)[0])) == 2
