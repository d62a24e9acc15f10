"""Runs of a model that can think: trained both ways, told at the start, and refused on a change."""

import json
from pathlib import Path

import pytest

import textpolicy as tp
from tests.thinking_models import write_thinking_model
from textpolicy.config import TrainConfig, config_from
from textpolicy.errors import ConfigError, TextPolicyError

REWARD = """
import json, pathlib

SEEN = pathlib.Path(__file__).with_suffix(".jsonl")

def reward(completion, thought, answer, visible_answer, in_thought, messages, gold):
    assert answer == visible_answer
    row = [completion, thought, answer, in_thought, messages]
    with SEEN.open("a") as file:
        file.write(json.dumps(row) + "\\n")
    return (len(set(completion)) + sum(map(ord, completion)) % 5) / 10
"""


@pytest.fixture
def settings(tmp_path: Path):
    """Return a function that makes the config of two steps of a model of a kind."""
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"{n}+{n}=", "gold": str(2 * n)} for n in range(10, 30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def make(kind: str, **model: object) -> dict[str, dict[str, object]]:
        folder = tmp_path / kind
        if not folder.exists():
            write_thinking_model(folder, kind)
        return {
            "task": {
                "data": str(tmp_path / "rows.jsonl"),
                "reward": f"{tmp_path / 'reward.py'}:reward",
            },
            "model": {"name": str(folder), **model},
            "sampling": {"max_tokens": 4, "temperature": 3.0},
            "rollout": {"groups_per_step": 2, "group_size": 2},
            "evaluation": {"count": 2},
            "trainer": {"lr": 0.01},
            "run": {"steps": 2},
        }

    return make


def seen(folder: Path) -> list[list]:
    return [json.loads(line) for line in (folder / "reward.jsonl").read_text().splitlines()][1:]


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_5"])
@pytest.mark.parametrize("way", ["on", "off"])
def test_a_model_is_trained_with_thinking_on_and_off(tmp_path, settings, kind, way):
    notes: list[str] = []
    result = tp.run(
        settings(kind, thinking=way), output=tmp_path / way, on_event=lambda e: notes.append(e.text)
    )
    assert (result.ended, result.updates) == ("finished", 2)
    (told,) = [note for note in notes if note.startswith("the first prompt")]
    end = {"off": "<think>\n\n</think>\n\n", "on": "<think>\n" if kind == "qwen3_5" else ""}[way]
    assert f"=<|im_end|>\n<|im_start|>assistant\n{end}\nthinking: {way} (enable_thinking" in told
    opened = kind == "qwen3_5" and way == "on"
    rows = seen(tmp_path)
    assert len(rows) == 2 + 2 * 4 + 2
    for completion, thought, answer, in_thought, messages in rows:
        assert in_thought is opened
        # Four tokens of the embedded model close no thought.
        assert (thought, answer) == ((completion.strip(), "") if opened else ("", completion))
        assert messages[-1]["content"] == completion


@pytest.mark.slow
def test_both_settings_sample_from_different_prompts(tmp_path, settings):
    adapters = []
    for way in ("on", "off"):
        result = tp.run(settings("qwen3", thinking=way), output=tmp_path / way)
        adapter = tp.AdapterContainer.from_directory(result.directory.latest).adapter()
        adapters.append({name: array.tolist() for name, array in adapter.arrays.items()})
    assert adapters[0] != adapters[1]


def test_the_default_of_the_template_is_trained_and_said(tmp_path, settings):
    notes: list[str] = []
    tp.run(settings("granite"), output=tmp_path / "run", on_event=lambda e: notes.append(e.text))
    (told,) = [note for note in notes if note.startswith("the first prompt")]
    assert told.endswith(
        "thinking: off, the default of the chat template; --thinking on changes it"
    )


def test_template_arguments_are_a_table_in_toml_as_in_trl(tmp_path, settings):
    file = tmp_path / "run.toml"
    file.write_text("[model.chat_template_kwargs]\nenable_thinking = false\n")
    from textpolicy.config import read_toml, to_toml

    config = read_toml(file, TrainConfig())
    assert config.model.chat_template_kwargs == {"enable_thinking": False}
    assert "chat_template_kwargs = {enable_thinking = false}" in to_toml(config)
    with pytest.raises(ConfigError, match="a value that JSON does not have"):
        config_from({"model": {"chat_template_kwargs": {"x": float("nan")}}}, config, "x")


def test_a_run_that_cannot_be_switched_leaves_nothing_behind(tmp_path, settings):
    with pytest.raises(ConfigError, match="The template reads: reasoning_effort"):
        tp.run(settings("gpt_oss", thinking="off"), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_system_message_from_a_file_is_read_and_a_changed_file_is_refused(tmp_path, settings):
    file = tmp_path / "rules.txt"
    file.write_text("Answer <|im_end|> briefly.\n")
    notes: list[str] = []
    config = settings("qwen3", thinking="off")
    config["task"]["system"] = str(file)
    tp.run(config, output=tmp_path / "run", on_event=lambda e: notes.append(e.text))
    (told,) = [note for note in notes if note.startswith("the first prompt")]
    assert "<|im_start|>system\nAnswer <|im_end|> briefly.<|im_end|>\n<|im_start|>user" in told
    messages = seen(tmp_path)[0][-1]
    assert messages[0] == {"role": "system", "content": "Answer <|im_end|> briefly."}
    file.write_text("Answer at length.")
    with pytest.raises(TextPolicyError, match=r"system message: rules\.txt has changed"):
        tp.run(resume=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"task\.system: "):
        tp.run({"task": {"system": "Other."}}, resume=tmp_path / "run")


def test_supervised_training_learns_from_the_prompts_of_each_setting(tmp_path, settings):
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(10, 30)]
    (tmp_path / "sft.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for way, end in (("on", "<think>\n"), ("off", "<think>\n\n</think>\n\n")):
        notes: list[str] = []
        config = {
            "data": {"source": str(tmp_path / "sft.jsonl")},
            "model": settings("qwen3_5")["model"] | {"thinking": way},
            "trainer": {"iterations": 2, "batch_size": 2},
            "run": {"validation_batches": 1},
        }
        tp.run(config, output=tmp_path / way, on_event=lambda e, notes=notes: notes.append(e.text))
        (told,) = [note for note in notes if note.startswith("the first prompt")]
        assert f"<|im_start|>assistant\n{end}\nthinking: {way}" in told
