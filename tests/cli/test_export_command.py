"""`textpolicy export` on the command line: its options, its answer and its messages."""

import json
from pathlib import Path

import pytest

from tests.export.conftest import trained

__all__ = ["trained"]


def test_the_answer_has_the_proof_and_the_commands(trained, answer, tmp_path):
    output = str(tmp_path / "out")
    found = answer(
        "export", trained(None, 0.05), "--model", "tiny", "--to", "vllm", "--output", output
    )
    assert found["folder"] == output and found["proof"]["kept"] == pytest.approx(1)
    assert "--enable-lora --lora-modules" in found["commands"][0]
    assert "--max-lora-rank 8" in found["commands"][0]
    printed = Path(output, "export.json").read_text()
    # What is published says nothing about this machine.
    assert str(tmp_path.parent) not in printed
    assert json.loads(printed)["proof"] == found["proof"]


def test_a_difference_above_the_tolerance_fails_the_export(trained, failure, tmp_path):
    argv = ["export", trained(None, 0.05), "--model", "tiny", "--to", "mlx"]
    message = failure(*argv, "--output", str(tmp_path / "out"), "--tolerance", "1e-6", code=1)
    assert message.startswith("textpolicy export: What was written is not what was trained")
    assert "log-probabilities differ by up to" in message and "expected at most 1.0e-06" in message
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_a_quantized_base_goes_over_a_float_base_only_if_asked(
    trained, answer, failure, tmp_path
):
    argv = ["export", trained(4, 0.05), "--model", "tiny", "--to", "peft"]
    output = ["--output", str(tmp_path / "out")]
    assert "--over-float-base" in failure(*argv, *output, code=2)
    proof = answer(*argv, *output, "--over-float-base")["proof"]
    assert proof["largest_difference"] < 1e-3 < 0.05 < proof["from_trained"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--to", "lm-studio"), "Did you mean lmstudio?"),
        (("--to", "GGUF"), "Did you mean gguf?"),
        (("--to", "Transformers"), "Did you mean hf?"),
        (("--to", "mlx", "--dtype", "q8_0"), "expected one of float32, bfloat16, float16"),
        (("--to", "peft", "--dtype", "float32"), "writes the adapter as it is"),
        (("--to", "peft", "--dequantize"), "--dequantize is for merged weights"),
        (("--to", "mlx", "--over-float-base"), "--over-float-base is for adapters"),
    ],
)
def test_an_option_that_says_nothing_about_the_format_is_an_error(
    options, said, trained, failure, tmp_path
):
    argv = ["export", trained(None, 0.05), "--model", "tiny", "--output", str(tmp_path / "out")]
    assert said in failure(*argv, *options, code=2)


def test_an_adapter_without_a_run_needs_the_name_of_its_model(trained, failure, tmp_path):
    argv = ["export", trained(None, 0.05), "--to", "mlx", "--output", str(tmp_path / "out")]
    assert "--model NAME" in failure(*argv, code=2)


def test_the_output_is_a_folder(trained, failure, tmp_path):
    argv = ["export", trained(None, 0.05), "--model", "tiny", "--to", "mlx", "--output"]
    message = failure(*argv, str(tmp_path / "model.gguf"), code=2)
    assert "is the name of a file" in message and str(tmp_path / "model") in message


@pytest.mark.slow
def test_an_export_is_replaced_only_with_force(trained, answer, failure, tmp_path):
    argv = ["export", trained(None, 0.05), "--model", "tiny", "--output", str(tmp_path / "out")]
    answer(*argv, "--to", "peft")
    assert "--force" in failure(*argv, "--to", "mlx-lm", code=2)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    answer(*argv, "--to", "mlx-lm", "--force")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_only_an_export(trained, failure, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("precious")
    argv = ["export", trained(None, 0.05), "--model", "tiny", "--to", "peft", "--force"]
    assert "no export" in failure(*argv, "--output", str(home), code=2)
    (home / "export.json").write_text("{}")
    assert "no export" in failure(*argv, "--output", str(home), code=2)
    (home / "export.json").write_text('{"textpolicy_export": 1, "files": ["export.json"]}')
    assert "thesis.txt" in failure(*argv, "--output", str(home), code=2)
    (tmp_path / "link").symlink_to(home)
    assert "symbolic link" in failure(*argv, "--output", str(tmp_path / "link"), code=2)
    assert (home / "thesis.txt").read_text() == "precious"
