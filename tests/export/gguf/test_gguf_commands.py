"""Commands take a GGUF LoRA wherever they take adapters."""

import json

from tests.export.gguf.models import adapted
from textpolicy.adapters.files.adapter_file import write_adapter_file
from textpolicy.cli import main
from textpolicy.export.gguf import write_gguf_lora


def test_generate_and_inspect_take_a_gguf_lora(load_tiny, tiny_architecture, tmp_path, capsys):
    model, _ = load_tiny()
    adapter = adapted(model).adapter()
    gguf = write_gguf_lora(tmp_path / "lora.gguf", adapter, tiny_architecture)
    ours = write_adapter_file(tmp_path / "ours.safetensors", adapter)

    def answer(*argv: str) -> dict:
        assert main([*argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    asked = ("generate", "--prompt", "12+30=", "--max-tokens", "8", "--temperature", "0")
    texts = [answer(*asked, "--adapter", str(path))["completions"] for path in (gguf, ours)]
    assert texts[0] == texts[1]
    modules = [answer("inspect", str(path))["modules"] for path in (gguf, ours)]
    assert modules[0] == modules[1]
