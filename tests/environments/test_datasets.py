"""Rows, templates and splits. Errors name file and line, and no code in data is executed."""

import json
from itertools import islice

import pytest

from textpolicy.environments import Dataset, load_rows
from textpolicy.environments.template import fill_template, template_columns
from textpolicy.errors import DataError

ROWS = [{"question": f"{n}+{n}=", "answer": 2 * n} for n in range(100)]


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_jsonl_and_csv_give_the_same_rows(tmp_path):
    lines = "".join(
        json.dumps(row) + "\n" for row in [{"a": "1,2", "b": "x\ny"}, {"a": "", "b": "é"}]
    )
    table = 'a,b\n"1,2","x\ny"\n,é\n'
    assert load_rows(write(tmp_path / "r.jsonl", lines)) == load_rows(
        write(tmp_path / "r.csv", table)
    )


@pytest.mark.proves("F19")
@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n',
        b'{"a": 1}\r\n{"a": 2}\r\n',
        b'\n{"a": 1}\n\n   \n{"a": 2}',
    ],
    ids=["byte order mark", "windows line ends", "blank lines and no last line end"],
)
def test_jsonl_as_other_programs_write_it_is_read(tmp_path, content):
    assert load_rows(write(tmp_path / "r.jsonl", content)) == [{"a": 1}, {"a": 2}]


@pytest.mark.proves("F19")
def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    assert load_rows(write(tmp_path / "r.jsonl", '{"a": "x\u2028y"}')) == [{"a": "x\u2028y"}]


@pytest.mark.proves("F19")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "not a row of JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b"[1, 2]", r"a list; expected an object, such as"),
        (b"[" * 200_000, "nested more than 64 deep"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (
            b'{"a": "' + b"x" * (17 * 2**20) + b'"}',
            "the line has more than 16,777,216 bytes",
        ),
    ],
    ids=["cut off", "NaN", "half a surrogate pair", "no object", "deep", "latin-1", "long"],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "rows.jsonl", b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 3.*{message}"):
        load_rows(path)


@pytest.mark.proves("F19")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3\n", r"line 3: 1 cells; expected 2, one for each of \['a', 'b'\]"),
        ("a,a\n1,2\n", r"line 1: the columns are \['a', 'a'\]; expected different names"),
        ('a,b\n1,"2\n', "not CSV"),
        ("", "has no rows"),
    ],
)
def test_a_bad_table_is_named_by_file_and_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / "rows.csv", text))


def test_a_missing_file_and_an_unknown_format_are_errors_with_the_name(tmp_path):
    with pytest.raises(DataError, match=r"'nowhere\.jsonl' does not exist"):
        load_rows("nowhere.jsonl")
    with pytest.raises(DataError, match=r"rows\.txt.*expected a file ending in \.jsonl, \.csv"):
        load_rows(write(tmp_path / "rows.txt", "x"))


def test_templates_take_columns_and_double_braces():
    assert fill_template("{{{question}}} = {answer}?", {"question": "x", "answer": 3}) == "{x} = 3?"
    system = [
        {"role": "system", "content": "Answer in {language}."},
        {"role": "user", "content": "{question}"},
    ]
    row = {"language": "French", "question": "Why?"}
    assert [m["content"] for m in fill_template(system, row)] == ["Answer in French.", "Why?"]
    assert template_columns(system) == ["language", "question"]


@pytest.mark.proves("S9")
@pytest.mark.parametrize(
    "value", ["{0.__class__}", "{{cycler.__init__}}", "{question}", "%s", "${HOME}", "{"]
)
def test_values_of_rows_stay_literal(value):
    assert fill_template("{question}!", {"question": value}) == f"{value}!"


@pytest.mark.proves("S9")
@pytest.mark.parametrize(
    "template", ["{row.__class__}", "{row[key]}", "{row!r}", "{row:>99999999}", "{}", "{0.x}"]
)
def test_a_template_holds_names_and_no_code(template):
    with pytest.raises(DataError, match=r"expected \{column\} alone"):
        fill_template(template, {"row": "x", "": "y", "0.x": "z"})


def test_a_missing_column_is_an_error_with_the_columns_of_the_rows():
    with pytest.raises(
        DataError,
        match=r"names the column \{questoin\}, but the columns of the rows are \['question', 'an",
    ):
        Dataset.from_rows(ROWS, "{questoin}")
    with pytest.raises(
        DataError, match=r"no column 'prompt'\. Their columns are \['question', 'answer'\]"
    ):
        Dataset.from_rows(ROWS)
    with pytest.raises(
        DataError, match=r"row 101: .*\{question\}, but the columns of the rows are \['answer'\]"
    ):
        Dataset.from_rows([*ROWS, {"answer": 1}], "{question}")


def test_a_value_that_is_not_text_is_not_written_into_a_prompt():
    with pytest.raises(DataError, match=r"row 1: column 'question' holds \['x'\] \(list\)"):
        Dataset.from_rows([{"question": ["x"]}], "{question}")


def test_a_prompt_is_text_or_messages():
    messages = [{"role": "user", "content": "2+2="}]
    data = Dataset.from_rows([{"prompt": messages}, {"prompt": "3+3="}])
    assert {str(task.prompt) for task in (*data.train, *data.held_out)} == {str(messages), "3+3="}
    with pytest.raises(DataError, match=r"row 2: the prompt is 5; expected text, or messages"):
        Dataset.from_rows([{"prompt": "2+2="}, {"prompt": 5}])


def test_held_out_rows_are_a_tenth_that_no_order_and_no_seed_changes():
    data = Dataset.from_rows(ROWS, "{question}")
    reordered = Dataset.from_rows(ROWS[::-1], "{question}")
    heldout = {task.prompt for task in data.heldout(1000)}
    assert len(heldout) == 10
    assert heldout == {task.prompt for task in reordered.heldout(1000)}
    assert not heldout & {task.prompt for task in islice(data.stream(0), 300)}


def test_a_prompt_that_occurs_twice_is_in_one_part_only():
    data = Dataset.from_rows(ROWS + ROWS, "{question}", held_out=0.5)
    train, heldout = ({task.prompt for task in part} for part in (data.train, data.held_out))
    assert len(data.train) == len(data.held_out) == 100
    assert not train & heldout


def test_each_epoch_has_every_row_once_in_its_own_order():
    data = Dataset.from_rows(ROWS, "{question}")
    first, second = (list(islice(data.stream(3), start, start + 90)) for start in (0, 90))
    assert (
        sorted(t.id for t in first)
        == sorted(t.id for t in second)
        == sorted(t.id for t in data.train)
    )
    assert first != second
    assert first == list(islice(data.stream(3), 90))
    assert first != list(islice(data.stream(4), 90))


def test_one_prompt_cannot_be_split():
    with pytest.raises(DataError, match="1 different prompt, but at least 2 are needed"):
        Dataset.from_rows([{"prompt": "x"}] * 5)


@pytest.mark.slow
def test_rows_come_from_files_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra [datasets] is not installed")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    splits = datasets.DatasetDict({"test": data, "dev": data.select([0])})
    splits.save_to_disk(str(tmp_path / "splits"))
    assert load_rows(tmp_path / "saved") == ROWS
    assert load_rows(tmp_path / "rows.parquet") == ROWS
    assert load_rows(tmp_path / "splits", split="test") == ROWS
    assert load_rows(f"{tmp_path / 'splits'}:dev") == ROWS[:1]
    with pytest.raises(DataError, match=r"has no split 'train'; its splits are \['test', 'dev'\]"):
        load_rows(tmp_path / "splits")
    assert len(Dataset.from_rows(data, "{question}").held_out) == 10
