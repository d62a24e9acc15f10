"""Write adapters with PEFT for the tests, and check that PEFT reads the adapters that we write.

    python benchmarks/peft_golden.py --write tests/golden/peft
    python benchmarks/peft_golden.py --read-back tests/golden/peft

`--write` makes small adapters with random weights on the embedded model, in float32. PEFT writes
their files, and the script adds the logits that PEFT computes. `--read-back` loads each adapter
with TextPolicy and writes it in PEFT's layout again. PEFT then reads these files, and the script
compares the logits and writes the differences to `read_back.json`. Both need torch, transformers
and peft, which the tests do not need. The exit code is 1 if any logit differs by more than
TOLERANCE of the largest logit.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from textpolicy.adapters import AdapterContainer
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.model_files import tiny_model

TOLERANCE = 1e-5
BASE = "textpolicy/tiny"
TOKENS = [[5, 17, 3, 44, 60, 2, 101, 9]]
KEPT = 3
"""The number of last positions whose logits are written."""
QV = ["q_proj", "v_proj"]
CASES: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": QV},
    "lora_other": {"r": 4, "lora_alpha": 6, "target_modules": QV},
    "dora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rslora": {
        "r": 4,
        "lora_alpha": 3,
        "target_modules": r".*\.(o_proj|gate_proj)",
        "use_rslora": True,
    },
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 1},
        "alpha_pattern": {"up_proj": 5},
    },
    "layers_to_transform": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["k_proj", "o_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "all_linear": {"r": 1, "lora_alpha": 2, "target_modules": "all-linear"},
    "lora_bias": {"r": 2, "lora_alpha": 4, "target_modules": ["v_proj"], "lora_bias": True},
    "tied_embedding": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["embed_tokens", "q_proj"],
        "ensure_weight_tying": True,
    },
    "untied_embedding": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["embed_tokens", "lm_head", "q_proj"],
    },
    # TextPolicy cannot compute the following cases, and must refuse them.
    "refused_lookup_only": {"r": 2, "target_modules": ["embed_tokens"]},
    "refused_modules_to_save": {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["norm"]},
}
COMBINED = {"linear": {}, "cat": {}, "svd": {"svd_rank": 3}}
WEIGHTS = {"lora": 0.7, "lora_other": -0.4}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FOLDER")
    what.add_argument("--read-back", type=Path, metavar="FOLDER")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.write:
            return write(arguments.write, Path(scratch))
        return read_back(arguments.read_back, Path(scratch))


def write(folder: Path, scratch: Path) -> int:
    """Write the adapters and the logits of every case."""
    logits = {"base": computed(base_model("lora", scratch))}
    for seed, (name, words) in enumerate(CASES.items()):
        model = get_peft_model(
            base_model(name, scratch), LoraConfig(task_type="CAUSAL_LM", **words)
        )
        randomize(model, seed)
        # PEFT can write the base's embeddings too. One case tests that they are ignored.
        with_base = name == "tied_embedding"
        model.save_pretrained(str(folder / name), save_embedding_layers=with_base)
        (folder / name / "README.md").unlink()
        logits[name] = computed(model)
    logits |= combined(folder, scratch)
    save_file(
        {name: value.numpy() for name, value in logits.items()}, folder / "logits.safetensors"
    )
    versions = {"peft": peft.__version__, "transformers": transformers.__version__}
    record = versions | {"torch": torch.__version__, "tokens": TOKENS, "kept": KEPT}
    record |= {"combined": {"weights": WEIGHTS, "methods": COMBINED}}
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


def combined(folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Return the logits of two adapters, combined by each method that TextPolicy has too."""
    model = PeftModel.from_pretrained(base_model("lora", scratch), str(folder / "lora"), "lora")
    model.load_adapter(str(folder / "lora_other"), "lora_other")
    logits: dict[str, torch.Tensor] = {}
    for method, words in COMBINED.items():
        names, weights = list(WEIGHTS), list(WEIGHTS.values())
        model.add_weighted_adapter(names, weights, method, method, **words)
        model.set_adapter(method)
        logits[f"combined_{method}"] = computed(model)
    return logits


def read_back(folder: Path, scratch: Path) -> int:
    """Compare the logits of PEFT with the adapters that TextPolicy has written."""
    found: dict[str, dict[str, Any]] = {}
    for name in (name for name in CASES if not name.startswith("refused")):
        base, _ = load_model(str(base_folder(name, scratch)))
        ours = AdapterContainer.from_directory(folder / name).load(base)
        written = scratch / f"{name}-again"
        ours.save(written, layout="peft")
        theirs = PeftModel.from_pretrained(base_model(name, scratch), str(written))
        expected = torch.tensor(load_file(folder / "logits.safetensors")[name])
        difference = float((computed(theirs) - expected).abs().max() / expected.abs().max())
        found[name] = {"difference": difference, "written": digests(written)}
        print(f"{name}: {difference:.1e}")
    worst = max(case["difference"] for case in found.values())
    record = {"peft": peft.__version__, "tolerance": TOLERANCE, "cases": found}
    (folder / "read_back.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"worst {worst:.1e} of the largest logit; allowed {TOLERANCE:.0e}")
    return int(worst > TOLERANCE)


def base_folder(name: str, scratch: Path) -> Path:
    """Return the embedded model; the untied case has the reversed embedding as its head."""
    if not name.startswith("untied"):
        return tiny_model()
    folder = scratch / "untied"
    if not folder.exists():
        shutil.copytree(tiny_model(), folder)
        model = AutoModelForCausalLM.from_pretrained(str(tiny_model()), dtype=torch.bfloat16)
        head = model.get_input_embeddings().weight.detach().flip(0).contiguous()
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(head)
        model.save_pretrained(str(folder))
    return folder


def base_model(name: str, scratch: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        str(base_folder(name, scratch)), dtype=torch.float32
    )
    # PEFT writes the name of the base into its files, and a path would differ between machines.
    model.name_or_path = model.config._name_or_path = BASE
    return model.eval()


def randomize(model: Any, seed: int) -> None:
    """Add noise to the adapters, so that they change the model's outputs."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data += noise


def computed(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits[0, -KEPT:]


def digests(folder: Path) -> dict[str, str]:
    """Return digests of the files, by which a test without PEFT recognizes files that PEFT read."""
    tensors = hashlib.sha256()
    for name, array in sorted(load_file(folder / "adapter_model.safetensors").items()):
        tensors.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    config = hashlib.sha256((folder / "adapter_config.json").read_bytes())
    return {"tensors": tensors.hexdigest(), "config": config.hexdigest()}


if __name__ == "__main__":
    sys.exit(main())
