"""Make the model inside the package: tokenizer, config, weights and card, all from one seed.

TextPolicy's own supervised trainer trains the weights on the tasks of `envs/`, until the model
solves about half of each task. Reinforcement learning can then improve the model.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from random import Random

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import qwen3
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from textpolicy import fast_cpu
from textpolicy.environments import Environment, load
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.model_files import tiny_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.generation.prompts import encode_prompt
from textpolicy.rewards import score
from textpolicy.training.sft import (
    BatchStream,
    Demonstration,
    SFTEvent,
    SFTParameters,
    TrainReport,
    train_sft,
)
from textpolicy.types import Progress, Sampling, Task

VOCABULARY = 320
END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Qwen's split: digits one by one, a word with its leading space, punctuation, line ends.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The words that become single tokens. Upper-case letters stay letters: `reverse` spells with them.
WORDS = [
    *("user", "assistant", "system", "sort", "reverse", "make"),
    "is from the and for that what with in it of to you are by so on",
]
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


CARD = """\
---
license: mit
pipeline_tag: text-generation
tags: [mlx, qwen3, textpolicy]
---
# TextPolicy's embedded model

A Qwen3-architecture model of {parameters:,} parameters that is about half able at four small
tasks, so that reinforcement learning has something to raise. It knows nothing else.

| task | a prompt | greedy accuracy on 512 held-out problems |
|---|---|---|
{rows}

The tasks are the modules of the same names in `textpolicy_envs`. Held-out problems were not
trained on.

The model has learned digits, capital letters, `+`, `-`, `*`, `=`, the space, and four words:
`sort`, `reverse`, `make` and `from`. The tokenizer has a token for each byte, so the model accepts
every other text too, and its answers to such a text mean nothing until it is trained on such texts.

**Made by** `make tiny-model` (seed {seed}; {versions}) on Linux, x86-64: supervised training of all
weights in float32 on generated problems, then rounded to bfloat16. The accuracies are those of
the rounded weights. The same machine and versions give the same bytes.

**Loads in** mlx-lm and in transformers: {checked}

**Licence** MIT, as TextPolicy.
"""
# The result of `python tools/check_tiny_model.py`, by the sha256 of the weights.
CHECKED = {
    "f612adfe8edb": (
        "transformers 5.23.0 with torch 2.13.0 gives the same tokens, and logits within 3e-5 in "
        "float32."
    )
}
# How often a task is drawn at the start. Addition is the slowest to learn.
TASKS = {"add": 4.0, "sort": 1.0, "reverse": 1.0, "countdown": 4.0}
# Greedy held-out accuracy that leaves room for reinforcement learning. When every task has reached
# this accuracy, the learning rate falls to zero, which raises each accuracy a little more.
ENOUGH = 0.38
# Sums without a carry come first, because they teach which digits belong together. Without them the
# model learns no addition for a long time. Such sums are this share of all sums.
WITHOUT_CARRIES = 0.06
BATCH, LEARNING_RATE, WARM_UP, COOL_DOWN, EVERY, MEASURED = 64, 1.5e-3, 100, 25, 25, 256


def build_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer: bytes, a few words, and Qwen's three special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, IM_START, IM_END]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special),
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_special_tokens(special)
    if tokenizer.get_vocab_size() != VOCABULARY:
        found = tokenizer.get_vocab_size()
        raise SystemExit(f"the tokenizer has {found} tokens; expected {VOCABULARY}: change WORDS")
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    build_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONFIG["max_position_embeddings"],
            "eos_token": IM_END,
            "pad_token": END,
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_config(folder: Path) -> None:
    """Write the config. The ids of the pad token and of the stop token are at the end."""
    tokens = {"pad_token_id": VOCABULARY - 3, "eos_token_id": VOCABULARY - 1}
    write_json(folder / "config.json", CONFIG | tokens)
    write_json(folder / "generation_config.json", tokens)


def write_weights(model: nn.Module, folder: Path) -> None:
    weights = tree_map(lambda array: array.astype(mx.bfloat16), model.parameters())
    path = str(folder / "model.safetensors")
    mx.save_safetensors(path, dict(tree_flatten(weights)), metadata={"format": "pt"})


class Curriculum:
    """Draws demonstrations of all tasks, more often of tasks whose accuracy is far below ENOUGH.

    A task that has reached ENOUGH is still drawn sometimes, because the model forgets other tasks.
    """

    def __init__(
        self, model: nn.Module, tokenizer: TokenizerWrapper, seed: int, measured: int
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.measured = measured
        self.environments = {name: load(name) for name in TASKS}
        self.streams = {name: env.stream(seed) for name, env in self.environments.items()}
        self.weights = dict(TASKS)
        self.carries = False
        self.rng = Random(seed)
        self.start = time.perf_counter()
        self.last: int | None = None

    def batches(self) -> Iterator[list[Demonstration]]:
        while True:
            names = self.rng.choices(list(TASKS), weights=list(self.weights.values()), k=BATCH)
            yield [self._demonstrate(name) for name in names]

    def rate(self, step: mx.array) -> mx.array:
        """Return the learning rate: it rises, stays, and falls to zero at the last step."""
        rate = LEARNING_RATE * mx.minimum(step / WARM_UP, 1)
        return rate if self.last is None else rate * (self.last - step) / COOL_DOWN

    def practise(self, report: SFTEvent) -> Progress:
        """Measure and print accuracies, and draw a task more often the lower its accuracy is."""
        if not isinstance(report, TrainReport):
            return Progress.MORE
        accuracy = {
            name: measure(self.model, self.tokenizer, environment, self.measured)
            for name, environment in self.environments.items()
        }
        shown = "  ".join(f"{name} {value:.2f}" for name, value in accuracy.items())
        seconds = time.perf_counter() - self.start
        print(
            f"{report.iteration:5d}  loss {report.loss:.3f}  {shown}  {seconds:.0f} s", flush=True
        )
        self.carries = self.carries or accuracy["add"] >= WITHOUT_CARRIES
        self.weights = {
            name: TASKS[name] * max(ENOUGH + 0.1 - got, 0) + 0.05 for name, got in accuracy.items()
        }
        if self.last is None and min(accuracy.values()) >= ENOUGH:
            self.last = report.iteration + COOL_DOWN
        return Progress.STOP if report.iteration == self.last else Progress.MORE

    def _demonstrate(self, name: str) -> Demonstration:
        task = next(task for task in self.streams[name] if self.carries or not carries(task))
        gold = self.environments[name].gold(task.example)
        prompt = encode_prompt(self.tokenizer, task.prompt)
        answer = [*self.tokenizer.encode(gold), self.tokenizer.eos_token_id]
        return Demonstration(
            tokens=prompt + answer, mask=[False] * len(prompt) + [True] * len(answer)
        )


def carries(task: Task) -> bool:
    """Return whether a task is a sum in which two digits add up to ten or more."""
    left, plus, right = str(task.prompt).rstrip("=").partition("+")
    return bool(plus) and any(int(a) + int(b) > 9 for a, b in zip(left, right, strict=True))


def loss(
    model: nn.Module,
    inputs: mx.array,
    targets: mx.array,
    lengths: mx.array,
    *,
    mask: mx.array,
) -> tuple[mx.array, mx.array]:
    """Return the loss, in the order of operations that reproduces the weights bit for bit."""
    logits = model(inputs).astype(mx.float32)
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    drawn = mx.take_along_axis(logp, targets[..., None], axis=-1).squeeze(-1)
    drawn, mask = (mx.pad(x, [(0, 0), (1, 0)]) for x in (drawn, mask))
    count = mx.sum(mask)
    return -mx.sum(mx.where(mask, drawn, 0.0)) / count, count


def measure(
    model: nn.Module, tokenizer: TokenizerWrapper, environment: Environment, count: int
) -> float:
    """Return the share of held-out tasks that greedy decoding solves."""
    sampling = Sampling(max_tokens=environment.max_tokens, temperature=0)
    tasks = environment.heldout(count)
    completions = ModelPolicy(model, tokenizer, sampling).generate([t.prompt for t in tasks])
    pairs = zip(tasks, completions, strict=True)
    return sum(score(environment.reward, t.prompt, c.text, t.example) for t, (c,) in pairs) / count


def make(
    folder: Path, *, seed: int, iterations: int, every: int = EVERY, measured: int = MEASURED
) -> None:
    """Write the model. Its accuracies are measured on `measured` tasks `every` so many steps."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    write_config(folder)
    mx.random.seed(seed)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(CONFIG))
    curriculum = Curriculum(model, load_tokenizer(folder), seed, measured)
    train_sft(
        model,
        BatchStream(curriculum.batches()),
        [],
        optim.AdamW(learning_rate=curriculum.rate, betas=[0.9, 0.98], weight_decay=0.01),
        parameters=SFTParameters(batch_size=BATCH, iterations=iterations, steps_per_report=every),
        loss=loss,
        on_progress=curriculum.practise,
    )
    write_weights(model, folder)


def write_card(folder: Path, *, seed: int) -> None:
    """Write the model card with the accuracies of the model, loaded back from its files."""
    model, tokenizer = load_model(folder)
    rows = [
        f"| `{name}` | `{next(load(name).stream(0)).prompt}` "
        f"| {measure(model, tokenizer, load(name), 512):.3f} |"
        for name in TASKS
    ]
    parameters = sum(array.size for _, array in tree_flatten(model.parameters()))
    digest = sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "tokenizers"))
    text = CARD.format(
        parameters=parameters,
        rows="\n".join(rows),
        seed=seed,
        versions=versions,
        checked=CHECKED.get(digest, "these weights were not compared yet."),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=tiny_model(), help="folder to write")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the weights and of the demonstrations"
    )
    parser.add_argument("--iterations", type=int, default=3000, help="largest number of iterations")
    options = parser.parse_args()
    # On matrices of this size a second thread costs more time than it saves.
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(1)
    make(options.output, seed=options.seed, iterations=options.iterations)
    write_card(options.output, seed=options.seed)


if __name__ == "__main__":
    main()
