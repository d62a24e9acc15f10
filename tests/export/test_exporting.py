"""`export`: every format is opened again and compared, and a wrong one leaves nothing."""

import json
import os
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_lm.utils import save_model

import textpolicy as tp
from tests.quick import quick_first
from textpolicy.adapters import AdapterConfig, AdapterContainer, quantize
from textpolicy.errors import ExportError, TextPolicyError, UnwritableError
from textpolicy.export import exporting
from textpolicy.export.formats import FORMATS
from textpolicy.export.job import ExportOptions
from textpolicy.export.source import find_source
from textpolicy.export.target import check_space
from textpolicy.generation.mlx_generation import load_model
from textpolicy.untrusted.parsing import read_json_object


@pytest.mark.parametrize("name", quick_first(3, FORMATS))
def test_an_export_is_a_folder_with_a_proof_that_holds(name, trained, tmp_path):
    path = trained(None, 0.05)
    exported = tp.export_adapter(path, name, tmp_path / "out", model="tiny")
    proof = exported.proof
    assert proof.adapter_effect > 0.1 and proof.kept == pytest.approx(1, abs=0.05)
    assert proof.largest_difference <= proof.tolerance and proof.tokens > 40
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["proof"]["kept"] == proof.kept and facts["format"] == name
    assert set(facts["files"]) == set(os.listdir(tmp_path / "out"))
    assert f"{proof.largest_difference:.1e} (" in (tmp_path / "out" / "README.md").read_text()
    shown = "textpolicy/out" if name == "lmstudio" else str(tmp_path / "out")
    assert shown in exported.commands[0]
    assert os.listdir(tmp_path) == ["out"]


def break_arrays(name, change):
    """Return the format `name` with a writer whose tensors `change` spoils."""
    whole = FORMATS[name]

    def write(job, folder):
        whole.write(job, folder)
        (path,) = folder.glob("*.safetensors")
        arrays, metadata = mx.load(str(path), return_metadata=True)
        change(arrays)
        mx.eval(arrays)
        mx.save_safetensors(str(path), arrays, metadata)

    return replace(whole, write=write)


def lose_one_module(arrays):
    """Set one module's B to zero: the export lost one part of the adapter."""
    name = next(name for name in arrays if "lora_b" in name.lower())
    arrays[name] = mx.zeros_like(arrays[name])


def double_the_adapter(arrays):
    for name in arrays:
        if "lora_b" in name.lower():
            arrays[name] = arrays[name] * 2


def swap_two_modules(arrays):
    first, second = [name for name in arrays if "q_proj" in name and "lora_b" in name.lower()]
    arrays[first], arrays[second] = arrays[second], arrays[first]


def put_nan(arrays):
    name = next(iter(arrays))
    arrays[name] = arrays[name] * float("nan")


def swap_two_weights(arrays):
    first, second = [name for name in arrays if name.endswith("self_attn.o_proj.weight")]
    arrays[first], arrays[second] = arrays[second], arrays[first]


def change_a_weight_a_little(arrays):
    """Change one weight by less than what bfloat16 explains."""
    name = next(name for name in arrays if name.endswith("o_proj.weight"))
    arrays[name] = arrays[name] * 1.02


def lose_a_weight(arrays):
    del arrays[next(name for name in arrays if name.endswith("o_proj.weight"))]


WRONG = [
    *(("peft", spoil) for spoil in (lose_one_module, double_the_adapter, swap_two_modules)),
    *(("mlx-lm", spoil) for spoil in (lose_one_module, double_the_adapter, put_nan)),
    ("vllm", lose_one_module),
    *(("mlx", spoil) for spoil in (swap_two_weights, lose_a_weight, put_nan)),
    ("mlx", change_a_weight_a_little),
    *(("hf", spoil) for spoil in (swap_two_weights, lose_a_weight)),
]


@pytest.mark.parametrize(("name", "spoil"), WRONG, ids=lambda one: getattr(one, "__name__", one))
def test_a_wrong_file_fails_the_export_and_leaves_nothing(name, spoil, trained, tmp_path):
    source = find_source(trained(None, 0.05), model="tiny")
    with pytest.raises(TextPolicyError) as caught:
        exporting.export(source, break_arrays(name, spoil), tmp_path / "out", ExportOptions())
    assert os.listdir(tmp_path) == [], caught.value


def test_a_small_adapter_that_got_lost_fails_the_export(trained, tmp_path):
    def write_the_base(job, folder):
        adapters = job.adapters
        adapters.swap({n: mx.zeros_like(a) for n, a in adapters.parameters().items()})
        FORMATS["hf"].write(job, folder)

    source = find_source(trained(None, 0.003), model="tiny")
    lost = replace(FORMATS["hf"], write=write_the_base)
    with pytest.raises(ExportError, match="0% of the adapter's effect is left") as caught:
        exporting.export(source, lost, tmp_path / "out", ExportOptions())
    # In bfloat16, the log-probabilities alone would not have shown it.
    assert "differ by" not in str(caught.value)


def test_the_export_of_an_untrained_adapter_names_the_last_one_of_the_run(tmp_path):
    # After one step, the best adapter is the one that sampled this step.
    settings = {
        "task": {"env": "add"},
        "rollout": {"groups_per_step": 4, "group_size": 4},
        "evaluation": {"count": 4},
        "run": {"steps": 1, "seed": 7},
    }
    run = tp.run(settings, output=tmp_path / "run").directory
    (note,) = tp.export_adapter(run.best, "peft", tmp_path / "best").notes
    assert "best.safetensors changes nothing" in note and "latest.safetensors in" in note
    assert tp.export_adapter(run.path, "peft", tmp_path / "latest").notes == ()


@pytest.fixture(scope="module")
def quantized_checkpoint(tmp_path_factory, tiny):
    """Return the folder of the embedded model with 4-bit weights, as mlx-lm converts one."""
    folder = tmp_path_factory.mktemp("quantized") / "tiny-4bit"
    model, _ = load_model("tiny")
    quantize(model, bits=4)
    save_model(folder, model)
    config = read_json_object(tiny / "config.json")
    form = {"bits": 4, "group_size": 64, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization": form}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, folder / name)
    return str(folder)


@pytest.mark.slow
def test_an_adapter_of_a_quantized_checkpoint_needs_no_option_for_mlx_lm(
    quantized_checkpoint, trained, tmp_path
):
    model = quantized_checkpoint
    path = trained(None, 0.05, name="over 4-bit", model=model)
    assert tp.export_adapter(path, "mlx-lm", tmp_path / "a", model=model).proof.from_trained is None
    with pytest.raises(ExportError, match="--over-float-base"):
        tp.export_adapter(path, "peft", tmp_path / "b", model=model)
    exported = tp.export_adapter(path, "peft", tmp_path / "b", model=model, over_float_base=True)
    # These floats stand for the same numbers. The float model behind the checkpoint is unknown.
    assert exported.proof.from_trained < 1e-3
    assert "was not measured" in exported.notes[0]
    exported = tp.export_adapter(path, "hf", tmp_path / "c", model=model)
    assert "quantization" not in read_json_object(tmp_path / "c" / "config.json")
    assert "hold its rounding" in exported.notes[0]


def test_an_export_that_does_not_fit_on_the_disk_is_refused_before_it_is_written(tmp_path):
    check_space(tmp_path / "out", 1000)
    with pytest.raises(UnwritableError, match="takes about"):
        check_space(tmp_path / "out", 10**18)


def test_an_adapter_without_an_effect_is_exported_and_said_to_have_none(tmp_path):
    model, _ = load_model("tiny")
    AdapterContainer.from_model(model, AdapterConfig(rank=2)).publish(tmp_path / "new.safetensors")
    exported = tp.export_adapter(
        tmp_path / "new.safetensors", "mlx", tmp_path / "out", model="tiny"
    )
    assert exported.proof.adapter_effect == 0 and exported.proof.largest_difference < 1e-4
    assert "too small to be measured" in str(exported.proof)
