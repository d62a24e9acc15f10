"""Columns of any layout, rows to measure on, and rows that are streamed."""

from itertools import count, islice

import pytest

from tests.environments.layouts import sums, write_jsonl, write_parquet
from textpolicy.environments import Dataset, from_dataset, load
from textpolicy.environments.data_source import DataSource
from textpolicy.environments.preamble import with_preamble
from textpolicy.environments.streamed_rows import BUFFER_ROWS, StreamedTasks
from textpolicy.errors import DataError
from textpolicy.rollout.task_source import TaskSource
from textpolicy.untrusted.bounds import MAX_BUFFER_BYTES

VERL = [
    {
        "data_source": "ada/sums",
        "prompt": [
            {"role": "system", "content": "Add.", "name": None},
            {"role": "user", "content": f"{n}+{n}=", "name": "ada"},
        ],
        "reward_model": {"style": "rule", "ground_truth": str(2 * n)},
        "extra_info": {"index": n, "answers": ["no", str(2 * n)]},
    }
    for n in range(20)
]


def located(rows):
    return ((f"rows.jsonl, line {number}", row) for number, row in enumerate(rows, start=1))


def tasks_of(data):
    return [*data.train, *data.held_out]


def test_columns_have_other_names_also_inside_of_columns(tmp_path):
    path = write_parquet(tmp_path / "verl.parquet", VERL)
    columns = {"gold": "reward_model.ground_truth", "second": "extra_info.answers.1"}
    data = DataSource(train=path, columns=columns).tasks(name="verl")
    for task in tasks_of(data):
        number = task.example["extra_info"]["index"]
        assert task.example["gold"] == task.example["second"] == str(2 * number)
        # null in a table is a key that the message does not have.
        assert task.prompt == [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": f"{number}+{number}=", "name": "ada"},
        ]


def test_a_column_with_a_dot_in_its_name_comes_first(tmp_path):
    rows = [{"a.b": "whole", "a": {"b": "inside"}, "prompt": str(n)} for n in range(2)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = DataSource(train=path, columns={"gold": "a.b"}).tasks(name="rows")
    assert {task.example["gold"] for task in tasks_of(data)} == {"whole"}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("questoin", r"line 1: there is no column 'questoin': .*Did you mean 'question'\?"),
        ("deep.b", r"'b' is not one of a$"),
        ("list.2", r"'2' is no entry of a list of 2"),
        ("list.-1", r"'-1' is no entry of a list of 2"),
        ("question.x", r"'x' is looked for in 'Why\?' \(str\), which has no parts"),
        (3, r"columns has gold=3; expected NAME=COLUMN"),
        ("", r"columns has gold=''; expected NAME=COLUMN"),
    ],
)
def test_a_column_that_does_not_exist_is_an_error_with_those_that_do(tmp_path, column, message):
    row = {"question": "Why?", "deep": {"a": 1}, "list": [1, 2]}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=message):
        DataSource(train=path, columns={"gold": column}).tasks("{question}", name="rows")


def test_rows_to_measure_on_are_measured_whole_and_never_trained_on(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", sums(0, 40))
    test = write_jsonl(tmp_path / "test.jsonl", sums(30, 20))
    for stream in (False, True):
        source = DataSource(train=train, held_out=test, stream=stream)
        data = source.tasks("{question}", name="sums")
        measured = [task.prompt for task in data.heldout(100)]
        assert measured == [row["question"] for row in sums(30, 20)]
        trained = {task.prompt for task in islice(data.stream(0), 60)}
        assert trained == {row["question"] for row in sums(0, 30)}
    note = DataSource(train=train, held_out=test).tasks("{question}", name="sums").split_note
    assert note.startswith("10 of 40 training rows have the prompt of a held-out row")
    with pytest.raises(DataError, match="no row is left to train on"):
        DataSource(train=test, held_out=test).tasks("{question}", name="sums")


def test_only_measured_rows_need_no_training_rows(tmp_path):
    test = write_jsonl(tmp_path / "test.jsonl", sums(0, 5))
    source = DataSource(train="nowhere.jsonl", held_out=test, only_measured=True)
    environment = load("gsm8k", source)
    assert len(environment.heldout(100)) == 5
    assert environment.make().reset(seed=0)[0].startswith(("0+0", "1+1", "2+2", "3+3", "4+4"))


def test_streamed_rows_are_drawn_once_an_epoch_in_an_order_of_the_seed(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", sums(0, 200))
    data = DataSource(train=path, stream=True).tasks("{question}", name="sums")
    held_out = data.heldout(1000)
    number = 200 - len(held_out)
    first, second = (list(islice(data.stream(3), at, at + number)) for at in (0, number))
    assert sorted(t.id for t in first) == sorted(t.id for t in second)
    assert len({t.id for t in first}) == number and first != second
    assert first == list(islice(data.stream(3), number))
    assert first != list(islice(data.stream(4), number))
    assert not {t.prompt for t in first} & {t.prompt for t in held_out}


def test_a_tenth_of_streamed_rows_is_held_out_by_hashes_as_of_whole_data(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", sums(0, 2000))
    streamed = DataSource(train=path, stream=True).tasks("{question}", name="sums")
    whole = DataSource(train=path).tasks("{question}", name="sums")
    some, all_of_them = ({task.prompt for task in data.heldout(2000)} for data in (streamed, whole))
    assert 170 < len(some) < 230
    assert some <= all_of_them or all_of_them <= some
    assert streamed.heldout(5) == streamed.heldout(100)[:5]


def test_a_stream_without_end_keeps_a_buffer_of_rows_in_memory():
    read = []

    def rows():
        for number in count():
            read.append(number)
            yield f"line {number}", {"prompt": str(number)}

    tasks = StreamedTasks("numbers", rows)
    drawn = [int(task.prompt) for task in islice(tasks.stream(0), 500)]
    assert len(set(drawn)) == 500
    assert BUFFER_ROWS < len(read) < 1.2 * (BUFFER_ROWS + 500)
    # The buffer is full before the first draw, so draws come from all of it.
    assert min(drawn) < 0.1 * BUFFER_ROWS and max(drawn) > 0.9 * BUFFER_ROWS
    assert len(tasks.heldout(16)) == 16


def test_a_buffer_of_long_rows_is_bounded_by_their_bytes():
    text, read = "x" * 2**22, []

    def rows():
        for number in count():
            read.append(number)
            yield f"line {number}", {"prompt": str(number), "text": text}

    next(StreamedTasks("long", rows).stream(0))
    assert len(read) * len(text) < 1.2 * MAX_BUFFER_BYTES


def test_a_resumed_source_continues_at_the_same_streamed_row(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", sums(0, 50))

    def source():
        return TaskSource(
            DataSource(train=path, stream=True).tasks("{question}", name="s").stream(7)
        )

    whole, before, after = source(), source(), source()
    tasks = whole.next_tasks(70)
    before.next_tasks(33)
    after.restore(before.state())
    assert after.next_tasks(37) == tasks[33:]


def test_streams_without_a_part_are_refused():
    few = StreamedTasks("few", lambda: located([{"prompt": "one"}]))
    with pytest.raises(DataError, match=r"none of the rows of few is held out.*--eval-data"):
        few.heldout(1)
    measured = (
        few.heldout
        if False
        else StreamedTasks(
            "all", lambda: located([{"prompt": "one"}]), held_out=list(islice(few.stream(0), 1))
        )
    )
    with pytest.raises(DataError, match=r"no training task: every prompt is held out"):
        next(measured.stream(0))


def test_streamed_rows_take_solved_examples_and_make_environments():
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(300)]
    tasks = StreamedTasks("sums", lambda: located(rows))
    environment = from_dataset(tasks, lambda completion, answer: float(completion == answer))
    shown = with_preamble(environment, few_shot=2, seed=0)
    task = next(shown.stream(0))
    assert len(task.preamble) == 4
    assert environment.make().reset(seed=0)[0].endswith("+1=")


def test_a_prompt_function_that_fails_names_the_row():
    with pytest.raises(DataError, match=r"row 2: no prompt can be written: KeyError: 'a'"):
        Dataset.from_rows([{"a": "x"}, {"b": "y"}], lambda row: row["a"])
