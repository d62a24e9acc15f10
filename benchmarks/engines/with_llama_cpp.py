"""Log-probabilities of llama.cpp, by the package xllamacpp. The model is one GGUF file.

The KV cache is float32 and flash attention is off, because their rounding is no property of an
export.
"""

import json
import urllib.request
from typing import Any

import numpy as np
from question import Question, chat, read_question, write_answer
from xllamacpp import (
    CommonAdapterLoraInfo,
    CommonParams,
    Server,
    ggml_type,
    llama_flash_attn_type,
)


def serve(question: Question, adapter: str | None) -> Server:
    params = CommonParams()
    params.model.path = question.model
    if adapter is not None:
        params.lora_adapters = [CommonAdapterLoraInfo(adapter, 1.0)]
    params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_ctx = 256
    params.n_gpu_layers = 0
    params.verbosity = 0
    return Server(params)


def ask(server: Server, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{server.listening_address}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def prompt(server: Server, text: str) -> list[int]:
    """Return the token ids that the file's chat template and tokenizer make of the text."""
    rendered = ask(server, "/apply-template", {"messages": chat(text)})["prompt"]
    body = {"content": rendered, "add_special": True, "parse_special": True}
    return ask(server, "/tokenize", body)["tokens"]


def log_probabilities(server: Server, ids: list[int], vocabulary: int) -> np.ndarray:
    # llama.cpp gives no log-probabilities of an answer that ends at once, or in half a character.
    # This bias makes it answer "a". The log-probabilities are those without the bias.
    (letter,) = ask(server, "/tokenize", {"content": "a"})["tokens"]
    body = {"prompt": ids, "n_predict": 1, "n_probs": vocabulary, "logit_bias": [[letter, 1e4]]}
    (first,) = ask(server, "/completion", body)["completion_probabilities"]
    row = np.full(vocabulary, np.nan)
    for one in first["top_logprobs"]:
        row[one["id"]] = one["logprob"]
    return row


def main() -> None:
    question = read_question()
    prompts, rows = [], {}
    for name, adapter in question.cases.items():
        server = serve(question, adapter)
        prompts = [prompt(server, text) for text in question.texts]
        rows[name] = [
            log_probabilities(server, ids, question.vocabulary) for ids in question.contexts
        ]
        del server
    write_answer(["xllamacpp"], prompts, rows)


if __name__ == "__main__":
    main()
