"""Estimate the memory of training models of known sizes, and of the recipes, without weights.

python tools/model_sizes.py                 print the table and the numbers of the recipes
python tools/model_sizes.py --write         write the table into docs/recipes.md, and the recipes
python tools/model_sizes.py --folder DIR    write a folder for each model, for `--model DIR/NAME`
                                            with --dry-run and with `textpolicy plan`

The estimates are those of `plan_memory` with weights of 16 bits, without the unpacked copies of a
quantized base that only a CPU makes. They were compared with measurements on a CPU. The folders
hold the config.json of the model and the tokenizer of the embedded model, and no weights.
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx

from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.config import TrainConfig, changed
from textpolicy.config.toml import read_toml
from textpolicy.experiment.model_defaults import with_model_defaults
from textpolicy.experiment.run_size import plan_step
from textpolicy.generation.model_files import tiny_model
from textpolicy.planning.adapter_plan import plan_adapters
from textpolicy.planning.memory_plan import MemoryPlan, plan_memory
from textpolicy.planning.unloaded_model import build_unloaded_model

_ROOT = Path(__file__).parents[1]
RECIPES = sorted((_ROOT / "recipes").glob("*.toml"))
_PAGE = _ROOT / "docs" / "recipes.md"
_PLANNED = re.compile(r"^# Planned memory: .*$", re.MULTILINE)
_START, _END = "<!-- sizes: written by tools/model_sizes.py -->\n", "<!-- end -->"
_GROUPS, _GROUP, _PROMPT, _COMPLETION = 8, 8, 128, 256
_QUANTIZATION = {"group_size": 64, "bits": 4}
# As in the templates of Qwen3: without thinking, an empty thought stands in the prompt.
_SWITCH = (
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """The numbers of a config.json in which the models of a family differ."""

    hidden: int
    inner: int
    layers: int
    heads: int
    cached_heads: int
    tied: bool = True
    kind: str = "qwen3"
    head_dim: int = 128
    vocabulary: int = 151936
    context: int = 40960


SIZES = {
    "SmolLM2-135M": Size(576, 1536, 30, 9, 3, True, "llama", 64, 49152, 8192),
    "Qwen3-0.6B": Size(1024, 3072, 28, 16, 8),
    "Qwen3-1.7B": Size(2048, 6144, 28, 16, 8),
    "Qwen3-4B": Size(2560, 9728, 36, 32, 8),
    "Qwen3-8B": Size(4096, 12288, 36, 32, 8, tied=False),
}


def architecture(size: Size) -> dict[str, Any]:
    """Return the config.json of a model of this size."""
    return {
        "model_type": size.kind,
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.cached_heads,
        "head_dim": size.head_dim,
        "vocab_size": size.vocabulary,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": size.context,
        "tie_word_embeddings": size.tied,
        "torch_dtype": "bfloat16",
    }


def write_folders(folder: Path) -> None:
    """Write a folder for each model, with everything that a dry run reads."""
    for name, size in SIZES.items():
        model = folder / name
        shutil.copytree(tiny_model(), model, ignore=shutil.ignore_patterns("*.safetensors"))
        (model / "config.json").write_text(json.dumps(architecture(size)), encoding="utf-8")
        with (model / "chat_template.jinja").open("a", encoding="utf-8") as template:
            template.write(_SWITCH)


def rows() -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| model | weights | adapters | sampling | training | training, checkpoints |"
    yield "|---|---|---|---|---|---|"
    for name, size in SIZES.items():
        for bits in (16, 4):
            config = architecture(size)
            quantized = config | {"quantization": _QUANTIZATION}
            yield _row(f"{name}, {bits} bits", config if bits == 16 else quantized)


def _row(name: str, config: Mapping[str, Any]) -> str:
    sizes: list[int] = []
    for checkpoints in (False, True):
        plan = plan_memory(
            config,
            AdapterConfig(),
            batch=_GROUPS * _GROUP,
            group_size=_GROUP,
            prompt_tokens=_PROMPT,
            completion_tokens=_COMPLETION,
            checkpoint_gradients=checkpoints,
            dtype=mx.bfloat16,
        )
        sizes.append(_on_a_gpu(plan).estimated_training_bytes)
    trained = plan_adapters(build_unloaded_model(config, mx.bfloat16), AdapterConfig())
    sampling = _on_a_gpu(plan).estimated_generation_bytes
    shown = (trained.base_bytes, trained.adapter_bytes, sampling, *sizes)
    return f"| {name} | {' | '.join(f'{size / 1e9:.2f} GB' for size in shown)} |"


def _on_a_gpu(plan: MemoryPlan) -> MemoryPlan:
    kept = {name: one for name, one in plan.arrays.items() if not name.startswith("unpacked")}
    return MemoryPlan(kept)


def planned_line(recipe: Path, folders: Path) -> str:
    """Return the comment about memory of a recipe; `folders` are those of `write_folders`."""
    config = read_toml(recipe, TrainConfig())
    model = folders / next(name for name in SIZES if name.lower() in config.model.name.lower())
    stands_in = {"model.name": str(model), "model.dtype": "bfloat16"}
    config = with_model_defaults(changed(config, stands_in))
    completion = config.sampling.max_tokens or _COMPLETION
    lengths = {"prompt_tokens": _PROMPT, "completion_tokens": completion}
    peaks = _on_a_gpu(plan_step(config, lengths)).peaks
    sizes = ", ".join(f"{bytes_ / 1e9:.1f} GB in {name}" for name, bytes_ in peaks.items())
    return f"# Planned memory: {sizes}, for prompts of {_PROMPT} tokens."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="write docs/recipes.md and the recipes"
    )
    parser.add_argument("--folder", type=Path, help="write folders of models without weights")
    options = parser.parse_args()
    if options.folder:
        write_folders(options.folder)
        return
    with TemporaryDirectory() as folder:
        write_folders(Path(folder))
        lines = {recipe: planned_line(recipe, Path(folder)) for recipe in RECIPES}
    table = "\n".join(rows())
    print(table, *(f"{recipe.name}: {line}" for recipe, line in lines.items()), sep="\n")
    if options.write:
        before, _, rest = _PAGE.read_text("utf-8").partition(_START)
        _, end, after = rest.partition(_END)
        _PAGE.write_text(f"{before}{_START}\n{table}\n\n{end}{after}", encoding="utf-8")
        for recipe, line in lines.items():
            recipe.write_text(_PLANNED.sub(line, recipe.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
