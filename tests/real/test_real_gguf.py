"""SmolLM2-135M in llama.cpp, with an adapter and without."""

import pytest

from tests.bases import trained
from tests.export.gguf.models import difference, logprobs
from tests.real.conftest import FOLDER
from textpolicy.adapters import AdapterConfig, AdapterContainer, shared_copy
from textpolicy.export.gguf import (
    logprobs_by_llama_cpp,
    tokens_by_llama_cpp,
    write_gguf,
    write_gguf_lora,
)
from textpolicy.generation.model_files import read_architecture_file

TEXTS = ["The capital of France is", "It's 1,234 miles: naïve? 日本\n\n  def f(x):<|im_end|>"]


# Writes 540 MB, and runs llama.cpp three times.
@pytest.mark.slow
def test_llama_cpp_computes_smollm2_with_a_lora_and_makes_its_tokens(real_model, tmp_path):
    shared, tokenizer = real_model
    model, architecture = shared_copy(shared), read_architecture_file(FOLDER)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    path = write_gguf(tmp_path / "base.gguf", model, tokenizer, architecture)
    assert tokens_by_llama_cpp(path, TEXTS) == prompts
    base = logprobs(model, prompts)
    container = AdapterContainer.from_model(model, AdapterConfig(rank=8))
    container.swap(trained(container, size=0.01))
    adapted = logprobs(model, prompts)
    assert difference(adapted, base) > 0.1
    lora = write_gguf_lora(tmp_path / "lora.gguf", container.adapter(), architecture)
    for adapter, expected in ((None, base), (lora, adapted)):
        found = logprobs_by_llama_cpp(path, prompts, architecture["vocab_size"], lora=adapter)
        assert difference(found, expected) < 5e-4
