"""GGUF files, the files of llama.cpp: a merged model, an adapter, and what llama.cpp computes."""

from textpolicy.export.gguf.llama_cpp import (
    has_llama_cpp,
    logprobs_by_llama_cpp,
    tokens_by_llama_cpp,
)
from textpolicy.export.gguf.lora_file import write_gguf_lora
from textpolicy.export.gguf.model_file import write_gguf
from textpolicy.export.gguf.opened_model import read_gguf_model
from textpolicy.export.gguf.token_check import compare_tokens_with_llama_cpp

__all__ = [
    "compare_tokens_with_llama_cpp",
    "has_llama_cpp",
    "logprobs_by_llama_cpp",
    "read_gguf_model",
    "tokens_by_llama_cpp",
    "write_gguf",
    "write_gguf_lora",
]
