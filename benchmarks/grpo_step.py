"""Compare the time and the memory of one GRPO step with other libraries on the same task.

    python benchmarks/grpo_step.py --peer both --beta 0.1 --json
    python benchmarks/grpo_step.py --peer both --model build/smollm2-135m --layers 16 --prompts 2

The model is a Qwen3 of 3.7 million random weights, or the folder that `--model` names, with LoRA of
rank 8 on every linear layer of all blocks, or of the last `--layers` blocks. The weights of the
model are float32 on a CPU and bfloat16 on a GPU, unless `--dtype` names one of both; LoRA is always
float32. A step has 4 prompts of 64 tokens, 8 completions of 64 tokens for each prompt, and one Adam
update. No completion ends early. Every library runs in its own process. The script asks one process
after another for a step, so that other load on the machine slows all libraries alike. It reports
medians and ratios of medians. `--trl-rows` says how many rows TRL takes at a time in its update;
without it, all. mlx-lm-lora decodes all rows at once: its trainer is called with a batch of all,
where its command has one number for prompts and rows. Its trainer updates with as many rows at a
time as there are prompts.

On a GPU, TRL generates with transformers, not with vLLM, and computes in bfloat16 by autocast where
the weights are bfloat16. The libraries may use TF32 for float32 products there. TRL's times are of
finished work: its process waits for the GPU before it reads the clock. "megabytes" then has the
peak of the GPU memory in use as "gpu".

The other libraries live in environments of their own, where this script looks for them:

    python -m venv build/peers/mlx-lm-lora
    build/peers/mlx-lm-lora/bin/pip install mlx-lm-lora==5.10.2 'mlx[cpu]' scipy-openblas32
    python -m venv build/peers/trl
    build/peers/trl/bin/pip install 'trl==1.16.*' torch peft

On a GPU, 'mlx[cuda13]' takes the place of 'mlx[cpu]' and scipy-openblas32, and torch is a build for
CUDA. A library that is not installed is left out, and the record says so. On a CPU, TextPolicy and
mlx-lm-lora both use OpenBLAS for mlx's products. All libraries have the same number of threads.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from setting import default_dtype, on_gpu, setting
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
MLX = "'mlx[cuda13]'" if on_gpu() else "'mlx[cpu]' scipy-openblas32"
PEERS = {
    "mlx-lm-lora": f"mlx-lm-lora==5.10.2 {MLX}",
    "trl": "'trl==1.16.*' torch peft",
}
DTYPES = ("float32", "bfloat16")
VOCABULARY = 2048
SIZES: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
}


def write_model(folder: Path, dtype: str) -> None:
    """Write a checkpoint of random weights in this dtype."""
    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs(**SIZES))
    model.set_dtype(getattr(mx, dtype))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    config = {"architectures": ["Qwen3ForCausalLM"], "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(SIZES | config))


def link_model(model: Path, folder: Path, dtype: str) -> None:
    """Link the weights of a model's folder, and copy its config without its end tokens.

    The config names this dtype, to which every library converts the weights when it loads them.
    """
    for file in model.glob("*.safetensors*"):
        (folder / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text())
    kept = {name: value for name, value in config.items() if not name.endswith("_token_id")}
    (folder / "config.json").write_text(json.dumps(kept | {"torch_dtype": dtype}))


def write_tokenizer(folder: Path) -> int:
    """Write a tokenizer of one word for each token; return the size of the vocabulary.

    The end token is outside the vocabulary, so that no completion ends early.
    """
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = {f"t{token}": token for token in range(size)} | {"<end>": size}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)
    return size


def prompts(count: int, length: int, vocabulary: int) -> list[str]:
    """Return prompts of random words. Every library gets the same prompts."""
    drawn = mx.random.randint(0, vocabulary, (count, length), key=mx.random.key(1)).tolist()
    return [" ".join(f"t{token}" for token in row) for row in drawn]


@dataclass
class LibraryProcess:
    """A running process of one library, and its measurements."""

    name: str
    process: subprocess.Popen[str]
    facts: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)

    def step(self) -> dict[str, float]:
        assert self.process.stdin
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.read()

    def finish(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.peaks = self.read()
        self.process.wait()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.name} ended early; its messages are above")
        return json.loads(line)


@contextmanager
def running(name: str, python: Path, task: Path) -> Iterator[LibraryProcess]:
    """Start the process of one library, and wait until it is ready."""
    script = {"ours": "ours.py"}.get(name, f"with_{name.replace('-', '_')}.py")
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [python, HERE / "sides" / script, task],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        side = LibraryProcess(name, process)
        side.facts = side.read()
        yield side
    finally:
        process.kill()
        process.wait()


def find_interpreters(peers: Sequence[str]) -> dict[str, Path]:
    """Return the Python interpreter of each library that is installed."""
    found = {"ours": Path(sys.executable)}
    for peer in peers:
        python = HERE.parent / "build" / "peers" / peer / "bin" / "python"
        if python.exists():
            found[peer] = python
        else:
            print(f"{peer} is not installed and is left out. To install it:", file=sys.stderr)
            folder = python.parent.parent
            print(f"  python -m venv {folder}", file=sys.stderr)
            print(f"  {folder}/bin/pip install {PEERS[peer]}", file=sys.stderr)
    return found


def peer_names(peer: str | None) -> list[str]:
    """Return the libraries that `--peer` asks for."""
    return [*PEERS] if peer == "both" else [peer] if peer else []


def measure(options: argparse.Namespace) -> list[LibraryProcess]:
    """Take steps of all libraries in turn. The first steps are warm-up and are not recorded."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as opened:
        folder = Path(name)
        if options.model:
            link_model(options.model, folder, options.dtype)
        else:
            write_model(folder, options.dtype)
        vocabulary = write_tokenizer(folder)
        task = {
            "model": str(folder),
            "dtype": options.dtype,
            "layers": options.layers,
            "trl_rows": options.trl_rows,
            "prompts": prompts(options.prompts, options.prompt_tokens, vocabulary),
            "group_size": options.group_size,
            "completion_tokens": options.completion_tokens,
            "rank": 8,
            "scale": 2.0,
            "learning_rate": 1e-5,
            "beta": options.beta,
            "threads": options.threads,
        }
        (folder / "task.json").write_text(json.dumps(task))
        sides = [
            opened.enter_context(running(name, python, folder / "task.json"))
            for name, python in find_interpreters(peer_names(options.peer)).items()
        ]
        for number in range(options.warm_up + options.runs):
            for side in sides:
                seconds = side.step()
                if number >= options.warm_up:
                    side.steps.append(seconds)
        for side in sides:
            side.finish()
    return sides


def quartiles(values: list[float]) -> list[float]:
    """Return the first and the third quartile; of one value, this value."""
    if len(values) == 1:
        return [*values, *values]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def summary(side: LibraryProcess, tokens: int) -> dict[str, Any]:
    """Return medians in seconds, memory in megabytes, and generated tokens per second."""
    names = [name for name in side.steps[0] if not name.endswith("peak")]
    medians = {name: statistics.median(step[name] for step in side.steps) for name in names}
    steps = sorted(step["step"] for step in side.steps)
    peaks = {name: value / 1e6 for name, value in side.peaks.items()}
    for name in side.steps[0].keys() & {"mlx_peak", "gpu_peak"}:
        peaks[name.removesuffix("_peak")] = max(step[name] for step in side.steps) / 1e6
    return {
        "facts": side.facts,
        "seconds": {name: round(value, 4) for name, value in sorted(medians.items())},
        "middle_half_of_steps": [round(quantile, 4) for quantile in quartiles(steps)],
        "megabytes": {name: round(value, 1) for name, value in sorted(peaks.items())},
        # The peak grows in the first steps. A leak makes it grow to the end.
        "megabytes_grown_in_second_half": round(
            (side.steps[-1]["peak"] - side.steps[len(side.steps) // 2]["peak"]) / 1e6, 1
        ),
        "tokens_per_second": round(tokens / medians["step"], 1),
        "tokens_per_second_generating": round(tokens / medians["generate"], 1),
    }


def ratios(records: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of TextPolicy divided by those of each other library."""
    ours = records["ours"]
    return {
        name: {
            f"{kind}_{key}": round(ours[kind][key] / record[kind][key], 3)
            for kind in ("seconds", "megabytes")
            for key in record[kind].keys() & ours[kind].keys()
            if record[kind][key]
        }
        for name, record in records.items()
        if name != "ours"
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=(*PEERS, "both"), help="default: TextPolicy alone")
    parser.add_argument("--model", type=Path, help="a folder (default: random weights)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=default_dtype(),
        help="dtype of the base's weights (default: float32 on a CPU, bfloat16 on a GPU)",
    )
    parser.add_argument("--layers", type=int, help="last blocks with LoRA (default: all)")
    parser.add_argument("--trl-rows", type=int, help="rows of TRL's micro-batch (default: all)")
    parser.add_argument(
        "--beta", type=float, default=0.0, help="weight of the KL term (default: 0)"
    )
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--completion-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--runs", type=int, default=9, help="steps of each library (default: 9)")
    parser.add_argument(
        "--warm-up", type=int, default=2, help="steps before the recorded steps (default: 2)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the object to a file too"
    )
    options = parser.parse_args()
    if options.runs < 1:
        parser.error(f"--runs is {options.runs}; expected at least 1")
    if options.model and not (options.model / "config.json").is_file():
        parser.error(f"{options.model} has no config.json; expected a model's folder")
    sides = measure(options)
    tokens = options.prompts * options.group_size * options.completion_tokens
    records = {side.name: summary(side, tokens) for side in sides}
    asked = {name: value for name, value in vars(options).items() if name not in ("json", "output")}
    asked["model"] = options.model.name if options.model else "random weights"
    left_out = [peer for peer in peer_names(options.peer) if peer not in records]
    record = {
        "setting": setting() | asked,
        "sides": records,
        "ours_over": ratios(records),
        "left_out": left_out,
    }
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    if options.json:
        print(json.dumps(record, indent=1))
        return
    for name, found in records.items():
        print(
            name,
            f"{found['seconds']['step']:.3f} s a step, half of the steps within",
            found["middle_half_of_steps"],
            found["seconds"],
            found["megabytes"],
        )
    for name, found in record["ours_over"].items():
        print(f"ours over {name}:", found)


if __name__ == "__main__":
    main()
