"""`export --to mlx` and `--to hf`: the adapter merged into the weights."""

import mlx.core as mx
import mlx_lm
import pytest

from textpolicy.generation.mlx_generation import create_policy, load_model
from textpolicy.untrusted.parsing import read_json_object

GREEDY = {"max_tokens": 6, "temperature": 0}


def export_of(adapter, output, to="mlx"):
    return ["export", adapter, "--model", "tiny", "--to", to, "--output", str(output)]


def said_by(model, tokenizer) -> list[str]:
    policy = create_policy(model, tokenizer, GREEDY)
    return [policy(prompt).text for prompt in ("12+30=", "sort: 3 1 2", "reverse: abc")]


@pytest.mark.slow
def test_mlx_lm_loads_a_merged_model_and_it_answers_as_with_the_adapters(trained, answer, tmp_path):
    adapter = trained(None, 0.2)
    report = answer(*export_of(adapter, tmp_path / "f"), "--dtype", "float32")
    assert report["survival"]["survival"] == pytest.approx(1)
    adapted, base = said_by(*load_model("tiny", adapter)), said_by(*load_model("tiny"))
    model, tokenizer = mlx_lm.load(str(tmp_path / "f"))
    assert said_by(model, tokenizer) == adapted != base
    assert not [name for name, _ in model.named_modules() if "lora" in name.lower()]


def test_merging_keeps_the_dtype_of_the_checkpoint(trained, answer, tmp_path):
    report = answer(*export_of(trained(None, 0.2), tmp_path / "f"))
    assert {module["dtype"] for module in report["survival"]["modules"]} == {"bfloat16"}
    weights = mx.load(str(tmp_path / "f" / "model.safetensors"))
    assert {weight.dtype for weight in weights.values()} == {mx.bfloat16}


def test_a_quantized_base_stays_quantized_if_enough_of_the_update_survives(
    trained, answer, tmp_path
):
    adapter = trained(8, 0.1)
    report = answer(*export_of(adapter, tmp_path / "f"))
    config = read_json_object(tmp_path / "f" / "config.json")
    assert config["quantization"] == {"bits": 8, "group_size": 64, "mode": "affine"}
    assert 0.9 < report["survival"]["survival"] < 1.1
    tokens = mx.array([[5, 17, 3, 44, 60, 2]])
    model, _ = mlx_lm.load(str(tmp_path / "f"))
    adapted, _ = load_model("tiny", adapter)
    base, _ = load_model("tiny")
    expected, moved = adapted(tokens), adapted(tokens) - base(tokens)
    # Rounding to 8 bits loses a small part of the update.
    assert mx.linalg.norm((model(tokens) - expected).flatten()) < 0.2 * mx.linalg.norm(
        moved.flatten()
    )


@pytest.mark.slow
def test_dequantize_makes_every_weight_of_a_quantized_base_a_float(trained, answer, tmp_path):
    adapter = trained(4, 0.3)
    argv = [*export_of(adapter, tmp_path / "f"), "--dequantize"]
    assert answer(*argv, "--dtype", "float32")["survival"]["survival"] == pytest.approx(1)
    weights = mx.load(str(tmp_path / "f" / "model.safetensors"))
    assert not [name for name in weights if name.endswith("scales")]
    model, tokenizer = mlx_lm.load(str(tmp_path / "f"))
    assert said_by(model, tokenizer) == said_by(*load_model("tiny", adapter))


@pytest.mark.slow
def test_an_update_that_rounding_would_erase_is_merged_only_with_min_survival_zero(
    trained, failure, answer, tmp_path
):
    adapter, output = trained(4, 1e-3), str(tmp_path / "f")
    message = failure(*export_of(adapter, output), code=1)
    assert "of the update" in message and "--dequantize" in message
    assert not (tmp_path / "f").exists()
    assert answer(*export_of(adapter, output), "--min-survival", "0")


def test_exporting_into_a_folder_with_files_is_an_error(trained, failure, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    argv = export_of(trained(None, 0.1), tmp_path)
    assert "not empty" in failure(*argv, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_tokenizer_of_a_merged_model_is_that_of_the_base(trained, answer, tmp_path, tiny):
    answer(*export_of(trained(None, 0.2), tmp_path / "f"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "f" / name).read_bytes() == (tiny / name).read_bytes()


def test_the_config_names_the_dtype_that_is_written(trained, answer, tmp_path):
    answer(*export_of(trained(None, 0.2), tmp_path / "f", "hf"), "--dtype", "float32")
    assert read_json_object(tmp_path / "f" / "config.json")["torch_dtype"] == "float32"
