"""What llama.cpp itself computes from a GGUF file, in a process of its own.

The package xllamacpp holds all of llama.cpp. A failed check of llama.cpp ends its process, so it
never runs in the process that asks.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from textpolicy.errors import ConfigError, ModelError
from textpolicy.untrusted.parsing import parse_json

_PROGRAM = """
import json, sys, urllib.request
import numpy
import xllamacpp

job = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path = job["model"]
if job["lora"]:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(job["lora"], 1.0)]
params.n_ctx = max([256, *(2 * len(prompt) + 64 for prompt in job["prompts"])])
params.n_parallel = 1
params.n_gpu_layers = 0
params.cpuparams.n_threads = job["threads"]
params.warmup = False
# A cache in float16 and flash attention would round.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)

def tokens_of(text, special=True):
    asked = {"content": text, "add_special": special, "parse_special": special}
    request = urllib.request.Request(
        server.listening_address + "/tokenize", json.dumps(asked).encode(),
        {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))["tokens"]

# Of an answer that ends at once, or in half a character, the server gives no log-probabilities. The
# bias makes it answer a letter. The log-probabilities are those without the bias.
letter = tokens_of("a", special=False)[-1]

def logprobs_after(prompt):
    answer = server.handle_completions({
        "prompt": prompt, "max_tokens": 1, "logprobs": job["vocabulary_size"],
        "logit_bias": [[letter, 10000.0]], "cache_prompt": False})
    row = numpy.full(job["vocabulary_size"], numpy.nan, numpy.float32)
    for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        row[token["id"]] = token["logprob"]
    return row

rows = [logprobs_after(prompt) for prompt in job["prompts"]]
if rows:
    numpy.save(job["output"], numpy.stack(rows))
with open(job["output"] + ".json", "w") as file:
    json.dump([tokens_of(text) for text in job["texts"]], file)
"""
_MAX_SECONDS = 600


def has_llama_cpp() -> bool:
    """Return whether llama.cpp can be run: the package xllamacpp is installed."""
    return find_spec("xllamacpp") is not None


def logprobs_by_llama_cpp(
    model: Path,
    prompts: Sequence[Sequence[int]],
    vocabulary_size: int,
    *,
    lora: Path | None = None,
) -> np.ndarray:
    """Return the log-probabilities of the whole vocabulary after each prompt, one row for each.

    `lora` is the GGUF file of an adapter. The prompts are token ids.
    """
    return computed_by_llama_cpp(model, prompts, vocabulary_size, [], lora=lora)[0]


def computed_by_llama_cpp(
    model: Path,
    prompts: Sequence[Sequence[int]],
    vocabulary_size: int,
    texts: Sequence[str],
    *,
    lora: Path | None = None,
) -> tuple[np.ndarray, list[list[int]]]:
    """Return the log-probabilities after prompts, and the token ids of texts, by one process."""
    rows, tokens = _run(model, lora, prompts, vocabulary_size, texts)
    if rows is None or not np.isfinite(rows).all():
        raise ModelError(
            f"llama.cpp gave no log-probability for some tokens of {model}. The vocabulary of the "
            f"file may not have {vocabulary_size} tokens"
        )
    return rows, tokens


def tokens_by_llama_cpp(model: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts, with control tokens where the texts spell them."""
    return _run(model, None, [], 0, texts)[1]


def _run(
    model: Path,
    lora: Path | None,
    prompts: Sequence[Sequence[int]],
    vocabulary_size: int,
    texts: Sequence[str],
) -> tuple[np.ndarray | None, list[list[int]]]:
    if not has_llama_cpp():
        raise ConfigError("running llama.cpp needs the package xllamacpp: pip install xllamacpp")
    with TemporaryDirectory() as folder:
        output = Path(folder) / "rows.npy"
        job: dict[str, Any] = {
            "model": str(model),
            "lora": str(lora) if lora else None,
            "prompts": [list(map(int, prompt)) for prompt in prompts],
            "vocabulary_size": vocabulary_size,
            "texts": list(texts),
            # Its threads wait busily for each other, so it is slow if they have no cores.
            "threads": max(1, (os.cpu_count() or 1) // 2),
            "output": str(output),
        }
        _run_program(model, json.dumps(job))
        tokens = parse_json((Path(folder) / "rows.npy.json").read_text())
        return (np.load(output) if prompts else None), tokens


def _run_program(model: Path, job: str) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            input=job,
            capture_output=True,
            text=True,
            timeout=_MAX_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"llama.cpp took more than {_MAX_SECONDS} s with {model}") from error
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        raise ModelError(
            f"llama.cpp cannot run {model}; its last words are:\n  " + "\n  ".join(words[-12:])
        )
