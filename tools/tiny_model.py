"""Makes the model inside the package: tokenizer, config, weights and card, all from one seed.

The weights are warmed up with TextPolicy's own supervised trainer on the tasks of `envs/`, each
until it is solved about half of the time: able, with room for reinforcement learning.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from itertools import islice
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
from textpolicy.generation.models import tiny_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.generation.prompts import encode_prompt
from textpolicy.rewards import score
from textpolicy.training.sft import Demonstration, Progress, TrainReport, train_sft
from textpolicy.types import Sampling, Task

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


# How much practice each task needs, beside the others.
TASKS = {"add": 6.0, "sort": 1.0, "reverse": 1.0, "countdown": 4.0}
# Greedy held-out accuracy: enough of each task ends the training, and is no longer practised.
ENOUGH = 0.45
BATCH, LEARNING_RATE, WARM_UP = 48, 2e-3, 100


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE: 256 bytes, a few merged words, three special tokens last, as Qwen has them."""
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
        raise SystemExit(f"the tokenizer has {tokenizer.get_vocab_size()} tokens: change WORDS")
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
    """End of text is the pad token, the end of an answer the stop token: their ids come last."""
    tokens = {"pad_token_id": VOCABULARY - 3, "eos_token_id": VOCABULARY - 1}
    write_json(folder / "config.json", CONFIG | tokens)
    write_json(folder / "generation_config.json", tokens)


def write_weights(model: nn.Module, folder: Path) -> None:
    weights = tree_map(lambda array: array.astype(mx.bfloat16), model.parameters())
    path = str(folder / "model.safetensors")
    mx.save_safetensors(path, dict(tree_flatten(weights)), metadata={"format": "pt"})


class Curriculum:
    """Demonstrations of all tasks, drawn more often from those that are still far from enough."""

    def __init__(self, model: nn.Module, tokenizer: TokenizerWrapper, seed: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.environments = {name: load(name) for name in TASKS}
        self.streams = {name: env.stream(seed) for name, env in self.environments.items()}
        self.weights = dict(TASKS)
        self.rng = Random(seed)
        self.start = time.perf_counter()

    def batches(self) -> Iterator[list[Demonstration]]:
        while True:
            names = self.rng.choices(list(TASKS), weights=list(self.weights.values()), k=BATCH)
            yield [self._demonstrate(name) for name in names]

    def _demonstrate(self, name: str) -> Demonstration:
        task = next(self.streams[name])
        gold = self.environments[name].gold(task.example)
        prompt = encode_prompt(self.tokenizer, task.prompt)
        answer = [*self.tokenizer.encode(gold), self.tokenizer.eos_token_id]
        return Demonstration(
            tokens=prompt + answer, mask=[False] * len(prompt) + [True] * len(answer)
        )

    def practise(self, report: TrainReport) -> Progress:
        """Measure, print, and give each task the weight of what it still lacks."""
        accuracy = {
            name: measure(self.model, self.tokenizer, environment, 128)
            for name, environment in self.environments.items()
        }
        seconds = time.perf_counter() - self.start
        shown = "  ".join(f"{name} {value:.2f}" for name, value in accuracy.items())
        print(
            f"{report.iteration:5d}  loss {report.loss:.3f}  {shown}  {seconds:.0f} s", flush=True
        )
        self.weights = {name: TASKS[name] * (max(ENOUGH - got, 0.0) + 0.05) for name, got in accuracy.items()}
        return Progress.STOP if min(accuracy.values()) >= ENOUGH else Progress.MORE


def measure(
    model: nn.Module, tokenizer: TokenizerWrapper, environment: Environment, count: int
) -> float:
    """The share of held-out tasks that greedy decoding solves."""
    sampling = Sampling(max_tokens=environment.max_tokens, temperature=0)
    tasks = environment.heldout(count)
    completions = ModelPolicy(model, tokenizer, sampling).generate([t.prompt for t in tasks])
    pairs = zip(tasks, completions, strict=True)
    return sum(score(environment.reward, t.prompt, c.text, t.example) for t, (c,) in pairs) / count


def make(folder: Path, *, seed: int, iterations: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    write_config(folder)
    mx.random.seed(seed)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(CONFIG))
    curriculum = Curriculum(model, load_tokenizer(folder), seed)
    rate = optim.join_schedules(
        [optim.linear_schedule(0, LEARNING_RATE, WARM_UP), lambda step: LEARNING_RATE], [WARM_UP]
    )
    train_sft(
        model,
        curriculum.batches(),
        optim.AdamW(learning_rate=rate, betas=[0.9, 0.98], weight_decay=0.01),
        iterations=iterations,
        steps_per_report=50,
        on_progress=curriculum.practise,
    )
    write_weights(model, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=tiny_model())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=2000, help="at most")
    options = parser.parse_args()
    make(options.output, seed=options.seed, iterations=options.iterations)
    model, tokenizer = load_model(options.output)
    for name in TASKS:
        print(name, measure(model, tokenizer, load(name), 512))


if __name__ == "__main__":
    main()
