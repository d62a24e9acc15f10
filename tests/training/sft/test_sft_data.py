"""Demonstrations from rows and files: the learned tokens, and errors with file and line."""

import json

import pytest

from textpolicy.errors import ConfigError, DataError
from textpolicy.generation.prompts import encode_prompt
from textpolicy.training.sft import Encoding, load_data, load_examples
from textpolicy.training.sft.data import choose_by_hash

# Templates that drop earlier answers, count messages, write no stop token, and drop thoughts.
FORGETFUL = """\
{%- for message in messages %}
{{- message['role'] + ': ' }}
{%- if loop.last or message['role'] != 'assistant' %}{{- message['content'] }}{% endif %}
{{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}
"""
COUNTING = """\
{{- messages | length }}
{%- for message in messages %}{{- message['role'] + ': ' + message['content'] + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}
"""
ENDLESS = """\
{%- for message in messages %}{{- message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}
"""
THOUGHTLESS = """\
{%- for message in messages %}
{{- message['role'] + ': ' + message['content'].split('</think>')[-1] + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}
"""
CHAT = [
    {"role": "user", "content": "sort 31"},
    {"role": "assistant", "content": "13"},
    {"role": "user", "content": "sort 42"},
    {"role": "assistant", "content": "24"},
]


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}


@pytest.fixture(scope="module")
def loaded(load_tiny):
    return load_tiny()[1]


@pytest.fixture
def tokenizer(loaded):
    template = loaded.chat_template
    yield loaded
    loaded.chat_template = template
    loaded.has_chat_template = True


def encode(tokenizer, row, **options):
    return Encoding(tokenizer=tokenizer, **options).demonstration(row, "row 1")


def parts(tokenizer, one):
    """Return the text that is not learned and the text that is learned."""
    pairs = list(zip(one.tokens, one.mask, strict=True))
    return tuple(
        tokenizer.decode([token for token, learned in pairs if learned is wanted])
        for wanted in (False, True)
    )


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Rows


def test_the_prompt_is_that_of_sampling_and_the_answer_ends_with_the_stop_token(tokenizer):
    one = encode(tokenizer, {"prompt": "1+1=", "completion": "2"})
    prompt = encode_prompt(tokenizer, "1+1=")
    assert one.tokens == [*prompt, *tokenizer.encode("2"), tokenizer.eos_token_id]
    assert one.mask == [False] * len(prompt) + [True, True]


def test_a_prompt_may_be_messages(tokenizer):
    messages = [{"role": "system", "content": "add"}, {"role": "user", "content": "1+1="}]
    one = encode(tokenizer, {"prompt": messages, "completion": "2"})
    prompt = encode_prompt(tokenizer, messages)
    assert one.tokens[: len(prompt)] == prompt and one.mask.index(True) == len(prompt)


def test_every_answer_of_a_conversation_is_learned_with_its_stop_token(tokenizer):
    one = encode(tokenizer, {"messages": CHAT})
    assert parts(tokenizer, one)[1] == "13<|im_end|>24<|im_end|>"
    # Text that the template writes after the last answer is never sampled, so it is not learned.
    assert one.tokens[-1] == tokenizer.eos_token_id
    assert one.tokens == tokenizer.apply_chat_template(CHAT)[: len(one.tokens)]


def test_messages_after_the_last_answer_teach_nothing(tokenizer):
    longer = [*CHAT, {"role": "user", "content": "thanks"}]
    assert encode(tokenizer, {"messages": longer}) == encode(tokenizer, {"messages": CHAT})


def test_instructions_with_and_without_input_are_one_user_message(tokenizer):
    row = {"instruction": "sort", "input": "31", "output": "13"}
    assert encode(tokenizer, row) == encode(tokenizer, {"prompt": "sort\n\n31", "completion": "13"})
    expected = encode(tokenizer, {"prompt": "sort", "completion": "13"})
    for empty in ({"input": ""}, {"input": None}, {}):
        assert encode(tokenizer, {"instruction": "sort", "output": "13", **empty}) == expected


def test_a_system_message_opens_conversations_that_have_none(tokenizer):
    told = encode(tokenizer, {"prompt": "1+1=", "completion": "2"}, system="add")
    assert parts(tokenizer, told)[0].startswith("<|im_start|>system\nadd<|im_end|>")
    own = [{"role": "system", "content": "own"}, *CHAT]
    assert encode(tokenizer, {"messages": own}, system="add") == encode(
        tokenizer, {"messages": own}
    )


def test_all_tokens_of_a_text_except_the_first_are_learned(tokenizer):
    one = encode(tokenizer, {"text": "sort 31"})
    assert one.tokens == [*tokenizer.encode("sort 31"), tokenizer.eos_token_id]
    assert one.mask == [False, *[True] * (len(one.tokens) - 1)]
    # A text with a stop token gets no second one.
    ended = {"text": "sort 31<|im_end|>"}
    assert encode(tokenizer, ended, allow_special_tokens=True) == one


def test_everything_can_be_learned(tokenizer):
    row = {"prompt": "1+1=", "completion": "2"}
    one = encode(tokenizer, row, learn="everything")
    assert one.tokens == encode(tokenizer, row).tokens
    assert one.mask == [False, *[True] * (len(one.tokens) - 1)]


def test_without_a_chat_template_prompts_and_completions_are_plain_text(tokenizer):
    tokenizer.has_chat_template = False
    one = encode(tokenizer, {"prompt": "1+1=", "completion": "2"})
    assert tokenizer.decode(one.tokens) == "1+1=2<|im_end|>"
    assert sum(one.mask) == 2
    with pytest.raises(DataError, match="row 1: the tokenizer has no chat template"):
        encode(tokenizer, {"messages": CHAT})


def test_a_template_that_drops_earlier_answers_is_refused_for_several_answers(tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(DataError, match=r"row 1: .* leaves out a part of message 2, '13'"):
        encode(tokenizer, {"messages": CHAT})
    one = encode(tokenizer, {"messages": CHAT[:2]})
    assert parts(tokenizer, one)[1] == "13<|im_end|>"


def test_a_template_that_drops_thoughts_of_the_last_answer_is_refused(tokenizer):
    tokenizer.chat_template = THOUGHTLESS
    thinking = {"prompt": "1+1=", "completion": "<think>easy</think>2"}
    with pytest.raises(DataError, match=r"row 1: .* leaves out a part of message 2"):
        encode(tokenizer, thinking)
    one = encode(tokenizer, {"prompt": "1+1=", "completion": "2"})
    assert parts(tokenizer, one)[1] == "2<|im_end|>"
    tokenizer.chat_template = THOUGHTLESS.replace(".split('</think>')[-1]", ".replace('>', '>\n')")
    assert "<think>\neasy</think>\n2" in parts(tokenizer, encode(tokenizer, thinking))[1]


def test_a_template_that_rewrites_earlier_messages_is_refused(tokenizer):
    tokenizer.chat_template = COUNTING
    with pytest.raises(DataError, match=r"row 1: .* before message 2 differently"):
        encode(tokenizer, {"messages": CHAT})


def test_a_template_without_stop_tokens_ends_the_last_answer_only(tokenizer):
    tokenizer.chat_template = ENDLESS
    assert encode(tokenizer, {"messages": CHAT[:2]}).tokens[-1] == tokenizer.eos_token_id
    with pytest.raises(DataError, match="no stop token after an answer"):
        encode(tokenizer, {"messages": CHAT})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "1+1", "answer": "2"}, r"columns \['question', 'answer'\]; expected"),
        ({"prompt": "1+1=", "completion": 2}, "completion is 2; expected text"),
        ({"text": ""}, "nothing to learn"),
        ({"messages": []}, r"messages are \[\]"),
        ({"messages": "hello"}, "messages are 'hello'"),
        ({"messages": [{"role": "user"}]}, "a role and a content"),
        ({"messages": CHAT[:1]}, r"roles are \['user'\]; expected an assistant's answer"),
        ({"messages": CHAT[1:]}, "expected an assistant's answer to a message"),
        ({"messages": [*CHAT, CALL]}, "message 5 has 'tool_calls' beside its content"),
        (
            {"messages": CHAT, "tools": [{"name": "add"}]},
            "the row has tools, which the model would not see",
        ),
    ],
)
def test_a_row_that_cannot_be_learned_is_an_error_with_the_reason(tokenizer, row, message):
    with pytest.raises(DataError, match=f"row 1: .*{message}"):
        encode(tokenizer, row)


@pytest.mark.parametrize("options", [{"learn": "prompts"}, {"max_length": 1}])
def test_invalid_encodings_are_refused(tokenizer, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Encoding(tokenizer=tokenizer, **options)


# Files


def test_a_part_is_a_jsonl_file_or_a_txt_file_and_never_both(tmp_path, tokenizer):
    (tmp_path / "train.txt").write_text("sort 1\n\nsort 2\r\n")
    assert load_examples(tmp_path, "train") == [{"text": "sort 1"}, {"text": "sort 2"}]
    write(tmp_path / "train.jsonl", {"text": "sort 3"})
    with pytest.raises(DataError, match=r"has train\.jsonl and train\.txt.*Keep one of them"):
        load_examples(tmp_path, "train")
    (tmp_path / "train.txt").unlink()
    assert load_examples(tmp_path, "train") == [{"text": "sort 3"}]
    with pytest.raises(DataError, match=r"has neither valid\.jsonl nor valid\.txt"):
        load_examples(tmp_path, "valid")


def test_a_folder_has_training_validation_and_test_data(tmp_path, tokenizer):
    for name, count in (("train", 4), ("valid", 2), ("test", 3)):
        write(tmp_path / f"{name}.jsonl", *[{"text": f"{name} {n}"} for n in range(count)])
    data = load_data(tmp_path, Encoding(tokenizer=tokenizer))
    assert (len(data.train), len(data.valid), len(data.test)) == (4, 2, 3)
    assert not data.split_off
    assert str(data) == "4 demonstrations to train on, 2 to validate, 3 to test"


def test_a_missing_validation_part_is_split_off_independently_of_the_order(tmp_path, tokenizer):
    rows = [{"text": f"sort {n}"} for n in range(50)]
    encoding = Encoding(tokenizer=tokenizer)
    data = load_data(write(tmp_path / "a.jsonl", *rows, *rows[:10]), encoding)
    assert data.split_off and "split off from the training data" in str(data)
    assert len(data.train) + len(data.valid) == 60
    assert not [one for one in data.valid if one in data.train]
    again = load_data(write(tmp_path / "b.jsonl", *reversed(rows), *rows[:10]), encoding)
    assert {tuple(one.tokens) for one in again.valid} == {tuple(one.tokens) for one in data.valid}
    assert not load_data(tmp_path / "a.jsonl", encoding, validation_share=0).valid
    with pytest.raises(DataError, match="validation_share is 1"):
        load_data(tmp_path / "a.jsonl", encoding, validation_share=1)


@pytest.mark.parametrize("name", ["validation.jsonl", "val.txt"])
def test_a_validation_part_with_another_name_is_an_error(tmp_path, tokenizer, name):
    encoding = Encoding(tokenizer=tokenizer)
    for part in ("train.jsonl", name):
        write(tmp_path / part, {"text": f"{part} 1"}, {"text": f"{part} 2"})
    with pytest.raises(DataError, match=rf"{name} would not be read. Rename the file to valid\."):
        load_data(tmp_path, encoding)
    write(tmp_path / "valid.jsonl", {"text": "sort 3"})
    assert len(load_data(tmp_path, encoding).valid) == 1


def test_one_row_cannot_be_split(tokenizer):
    one = encode(tokenizer, {"text": "sort 31"})
    with pytest.raises(DataError, match="1 distinct row; expected at least 2"):
        choose_by_hash([one, one], 0.5)


def test_a_template_and_a_gold_column_make_the_demonstration_of_prompt_and_completion(
    tmp_path, tokenizer
):
    encoding = Encoding(tokenizer=tokenizer)
    rows = [{"question": f"{n}+1", "right": str(n + 1), "text": "unused"} for n in range(20)]
    found = load_data(
        write(tmp_path / "a.jsonl", *rows),
        encoding,
        columns={"q": "question"},
        prompt="{q}=",
        gold_column="right",
    )
    plain = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(20)]
    assert found.train == load_data(write(tmp_path / "b.jsonl", *plain), encoding).train
    assert [encoding.demonstration(row, "") for row in found.valid_rows] == found.valid
    assert all(row["text"] == "unused" for row in found.valid_rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "{question}="}, "has no column 'completion'.*such as --gold-column answer"),
        ({"gold_column": "answer"}, r"has no column 'prompt'.*such as --prompt '\{question\}'"),
        ({"gold_column": "answers"}, "there is no column 'answers'.*Did you mean 'answer'"),
        ({"prompt": "{query}"}, "names the column {query}, but the columns of the rows are"),
        ({}, r"Name the columns, such as --prompt '\{question\}' --gold-column answer"),
    ],
)
def test_an_unnamed_part_of_a_row_is_an_error_that_says_how_to_name_it(
    tmp_path, tokenizer, options, message
):
    path = write(tmp_path / "rows.jsonl", {"question": "1+1=", "answer": "2"})
    with pytest.raises(DataError, match=f"rows.jsonl, line 1: .*{message}"):
        load_data(path, Encoding(tokenizer=tokenizer), **options)


def test_truncation_is_reported_and_rows_without_an_answer_are_left_out(tmp_path, tokenizer):
    path = write(
        tmp_path / "train.jsonl",
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": "1+1=", "completion": "2 is the answer"},
        {"prompt": "a very long question without room", "completion": "2"},
    )
    encoding = Encoding(tokenizer=tokenizer, max_length=16)
    data = load_data(path, encoding, validation_share=0)
    assert (len(data.train), data.truncated, data.dropped) == (2, 1, 1)
    assert [len(one.tokens) for one in data.train] == [14, 16]
    assert "1 rows are truncated at the limit of 16 tokens" in str(data)
    assert "1 rows have no answer within the limit of 16 tokens and are left out" in str(data)
    with pytest.raises(DataError, match="has no answer within the limit of 4 tokens"):
        load_data(path, Encoding(tokenizer=tokenizer, max_length=4))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "sort', "not a row of JSON"),
        ('["text"]', "a list; expected an object"),
        ('{"txt": "sort 31"}', r"columns \['txt'\]"),
        ('{"text": 31}', "text is 31"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, tokenizer, line, message):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "sort 12"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"train\.jsonl, line 3: .*{message}"):
        load_data(tmp_path, Encoding(tokenizer=tokenizer))


def test_a_bad_line_of_csv_is_named_too(tmp_path, tokenizer):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"1+\n1=",2\n2+2=<|im_end|>,4\n')
    with pytest.raises(DataError, match=r"rows\.csv, line 4: a message contains the stop token"):
        load_data(path, Encoding(tokenizer=tokenizer, allow_special_tokens=True))


@pytest.mark.slow
def test_hugging_face_data_sets_are_read_from_local_files(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(5)]
    encoding = Encoding(tokenizer=tokenizer)
    expected = [encoding.demonstration(row, "") for row in rows]
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(tmp_path / "rows.parquet")
    made.save_to_disk(tmp_path / "one")
    splits = {"train": made, "validation": made.select(range(2)), "test": made.select(range(1))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "several")
    for source in ("rows.parquet", "one"):
        assert load_data(tmp_path / source, encoding, validation_share=0).train == expected
    data = load_data(tmp_path / "several", encoding)
    assert (data.train, data.valid, data.test) == (expected, expected[:2], expected[:1])
    bad = datasets.Dataset.from_list([*rows, {"prompt": "1+1=", "completion": None}])
    bad.save_to_disk(tmp_path / "bad")
    with pytest.raises(DataError, match="bad, row 6: the completion is None"):
        load_data(tmp_path / "bad", encoding)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ((), "but nothing; expected"),
        (("rows.csv", "a.json"), "but a.json, rows.csv; expected"),
        ("abcdefg", "but a, b, c, d, e and 2 more; expected"),
    ],
)
def test_a_folder_without_training_data_is_an_error_with_its_files(
    tmp_path, tokenizer, names, told
):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=f"neither train.jsonl nor train.txt, {told}"):
        load_data(tmp_path, Encoding(tokenizer=tokenizer))
