"""What an export reads of a run: its adapter, its base, its prompts, its system message."""

import json
import os
import shutil

import pytest
from mlx_lm.utils import load_tokenizer

import textpolicy as tp
from textpolicy.config import TrainConfig, changed, to_toml
from textpolicy.errors import ConfigError
from textpolicy.export.asking import read_asking
from textpolicy.export.source import find_source
from textpolicy.generation.model_files import tiny_model
from textpolicy.runs import RunDirectory
from textpolicy.untrusted.bounds import MAX_DATA_LINE_BYTES


@pytest.fixture
def run(tmp_path, trained):
    """Return the directory of a run with a latest adapter and no samples."""
    directory = RunDirectory(tmp_path / "run")
    directory.claim()
    directory.write_config(to_toml(changed(TrainConfig(), {"task.env": "add"})))
    directory.adapters.mkdir()
    shutil.copy(trained(None, 0.05), directory.latest)
    return directory


def prompts_of(run, count):
    return list(read_asking(run, load_tokenizer(tiny_model()), count).prompts)


def system_of(run):
    return read_asking(run, load_tokenizer(tiny_model()), 1).system


def write_samples(run, prompts):
    rows = [{"step": 0, "prompt": prompt} for prompt in prompts]
    run.samples.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_gives_its_best_measured_adapter_or_else_its_latest(run):
    assert find_source(run.path).adapter == run.latest
    shutil.copy(run.latest, run.best)
    assert find_source(run.path).adapter == run.latest
    run.write_config(to_toml(changed(TrainConfig(), {"evaluation.every": 2})))
    source = find_source(run.path)
    assert source.adapter == run.best and source.model == "tiny"
    # An adapter of a run is that adapter, over the model of the run.
    assert find_source(run.latest).adapter == run.latest
    assert find_source(run.latest).directory.path == run.path


def test_a_run_that_names_no_adapter_or_no_model_is_an_error(run):
    run.config.write_text("[model]\nname = 3\n")
    with pytest.raises(ConfigError, match="names the model 3; expected a text"):
        find_source(run.path)
    run.latest.unlink()
    with pytest.raises(ConfigError, match="has no adapter latest"):
        find_source(run.path)
    with pytest.raises(ConfigError, match="no run and no adapter at"):
        find_source(run.path / "nothing", model="tiny")


def test_the_prompts_are_the_first_different_ones_of_the_run(run):
    plain = prompts_of(run, 3)
    assert len(plain) == 3
    write_samples(run, ["1+1=", "1+1=", [{"role": "user", "content": "2+2="}], "3+3=", "4+4="])
    assert prompts_of(run, 3) == ["1+1=", [{"role": "user", "content": "2+2="}], "3+3="]
    assert prompts_of(run, 9)[-1] == "4+4="


DAMAGE = {
    "no rows": b"\x00\xff not json\n[1]\n3\n",
    "no prompts": b'{"prompt": 3}\n{"prompt": ""}\n{"prompt": []}\n{}\n',
    "wrong messages": b'{"prompt": [{"role": "root", "content": "x"}]}\n{"prompt": [1]}\n',
    "nested too deep": b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_lines_that_hold_no_prompt_are_left_out(damage, run):
    good = b'{"step": 0, "prompt": "5+5="}\n'
    run.samples.write_bytes(DAMAGE[damage] + good)
    assert prompts_of(run, 4) == ["5+5="]


def test_a_line_without_end_is_read_in_bounded_pieces(run):
    with run.samples.open("wb") as file:
        file.truncate(3 * MAX_DATA_LINE_BYTES)
    assert prompts_of(run, 2) == prompts_of(run, 9)[:2]


def test_samples_that_are_a_pipe_are_not_waited_for(run):
    os.mkfifo(run.samples)
    assert prompts_of(run, 2)


def test_the_system_message_is_the_one_that_all_prompts_begin_with(run):
    assert system_of(run) is None
    asked = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": q}] for q in "ab"
    ]
    write_samples(run, asked)
    assert system_of(run) == "Be brief."
    write_samples(run, [*asked, "c"])
    assert system_of(run) is None


def test_the_system_message_of_the_config_comes_first_and_is_exported(run, tmp_path):
    config = {"task.env": "add", "task.system": "Say the sum."}
    run.write_config(to_toml(changed(TrainConfig(), config)))
    write_samples(
        run, ["1+1=", [{"role": "system", "content": "x"}, {"role": "user", "content": "2"}]]
    )
    assert system_of(run) == "Say the sum."
    assert [prompt[0]["content"] for prompt in prompts_of(run, 2)] == ["Say the sum.", "x"]
    (tmp_path / "rules.txt").write_text("From a file.\n")
    config["task.system"] = str(tmp_path / "rules.txt")
    run.write_config(to_toml(changed(TrainConfig(), config)))
    exported = tp.export_adapter(run.path, "ollama", tmp_path / "out")
    assert 'SYSTEM """From a file."""' in (tmp_path / "out" / "Modelfile").read_text()
    assert "The system message is the content of rules.txt." in exported.notes


def test_arguments_of_the_chat_template_that_the_model_does_not_read_are_an_error(run, tmp_path):
    run.config.write_text("[model]\nchat_template_kwargs = {enable_thinking = false}\n")
    with pytest.raises(ConfigError, match="enable_thinking"):
        tp.export_adapter(run.path, "peft", tmp_path / "out")


def test_an_export_of_a_run_says_which_run_and_no_path_of_the_machine(run, tmp_path):
    write_samples(run, ["12+30=", "7+8="])
    exported = tp.export_adapter(run.path, "peft", tmp_path / "out")
    assert exported.proof.prompts == 2
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["source"] == {
        "run": "run",
        "adapter": "latest.safetensors",
        "adapter_version": 1,
        "model": "tiny",
    }
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize("weights", [None, "float16"])
def test_a_model_that_computes_in_bfloat16_as_on_a_gpu_is_exported_as_gguf(run, tmp_path, weights):
    """Our reader of GGUF computes in float32, and the model may compute in fewer bits."""
    config = {"task.env": "add", "model.dtype": "bfloat16"}
    run.write_config(to_toml(changed(TrainConfig(), config)))
    proof = tp.export_adapter(run.path, "gguf", tmp_path / "out", dtype=weights).proof
    assert proof.from_merged is not None and proof.from_merged < 2e-3
