"""Every kind of adapter, over every base, in every format: exported right, or refused with advice.

The two tables of docs/export.md are the expectation, so that the page and the code cannot differ.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from mlx_lm.utils import save_model

import textpolicy as tp
from tests.tiny import expert_model
from textpolicy.adapters import AdapterConfig, LoRARule
from textpolicy.errors import TextPolicyError
from textpolicy.export.formats import FORMATS
from textpolicy.export.gguf_folders import write_ollama

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")
KINDS = {
    "LoRA": AdapterConfig(rank=4),
    "DoRA": AdapterConfig(rank=4, kind="dora"),
    "rsLoRA": AdapterConfig(rules=[LoRARule(rank=4, alpha=5, rslora=True)]),
    "ranks by module": AdapterConfig(
        rules=[LoRARule(module_path=".*q_proj", rank=2, scale=3.0), LoRARule(rank=4, alpha=6)]
    ),
    "LoRA with a bias": AdapterConfig(rules=[LoRARule(rank=4, bias=True)]),
    "tied embedding": AdapterConfig(
        rules=[LoRARule(module_path=".*embed_tokens"), LoRARule(module_path=".*_proj", rank=4)]
    ),
    "experts": AdapterConfig(rank=2),
}
BASES = {
    "float": (None, "affine"),
    "8-bit": (8, "affine"),
    "4-bit": (4, "affine"),
    "NF4": (4, "nf4"),
}
OPTIONS = {"--dequantize": "dequantize", "--over-float-base": "over_float_base"}
# A small update, as those of reinforcement learning are.
SIZE = 0.005
# Formats that are written and proved by the same functions as another one.
TWINS = {"ollama": "gguf", "lmstudio": "mlx"}


def table(title):
    """Return the cells of the table whose first column has this title, by row and by column."""
    (found,) = re.findall(rf"^\| {title} \| `mlx` \|.*?(?=\n\n)", PAGE, re.MULTILINE | re.DOTALL)
    head, _, *rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in found.split("\n")
    ]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


HELD, OVER = table("adapter"), table("base")


def test_the_tables_have_all_kinds_bases_and_formats():
    assert HELD.keys() == KINDS.keys() and OVER.keys() == BASES.keys()
    for row in (*HELD.values(), *OVER.values()):
        assert row.keys() == FORMATS.keys()


def test_a_format_that_is_named_instead_holds_the_adapter():
    for row in HELD.values():
        assert {row[cell] for cell in row.values() if cell != "yes"} <= {"yes"}


@pytest.mark.parametrize(("name", "other"), TWINS.items())
def test_a_format_that_is_proved_as_another_one_holds_and_refuses_the_same(name, other):
    one, two = FORMATS[name], FORMATS[other]
    parts = ("base", "weight_formats", "refuse", "size", "reopen", "tolerance")
    assert [getattr(one, part) for part in parts] == [getattr(two, part) for part in parts]
    # Ollama's file is that of llama.cpp, with a Modelfile beside it.
    assert one.write in (two.write, write_ollama)
    assert all(row[name] == row[other] for row in (*HELD.values(), *OVER.values()))


@pytest.fixture(scope="module")
def experts(tmp_path_factory, tiny):
    """Return the folder of a small mixture of experts with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("experts") / "experts"
    model = expert_model(vocab_size=320, max_position_embeddings=512)
    save_model(folder, model)
    config = {**vars(model.args), "eos_token_id": 319, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, folder / name)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        pytest.param(kind, base, marks=pytest.mark.slow if is_quick else pytest.mark.long)
        for kind in KINDS
        for base in BASES
        # 8-bit and NF4 differ from 4-bit by the base alone, which three kinds show.
        for is_quick in [kind in ("LoRA", "DoRA", "experts") or base in ("float", "4-bit")]
    ],
)
def test_every_format_holds_an_adapter_or_names_another_way(kind, base, trained, experts, tmp_path):
    bits, mode = BASES[base]
    model = experts if kind == "experts" else "tiny"
    path = trained(bits, SIZE, mode, KINDS[kind], name=kind, model=model)
    wrong = {}
    for name in FORMATS if kind == "LoRA" else FORMATS.keys() - TWINS:
        held, option = HELD[kind][name], OVER[base][name]
        options = [{}] if option == "yes" else [{}, {OPTIONS[option]: True}]
        expected = [option, held] if option != "yes" else [held]
        for given, expect in zip(options, expected, strict=True):
            found = outcome(path, name, tmp_path / "out", model, given)
            # A kind that the format cannot hold may be refused first.
            if found != expect and not (held != "yes" and found == held):
                wrong[name, *given] = f"{found}, not {expect}"
    assert wrong == {}


def outcome(path, name, folder, model, given):
    """Return "yes" for an export whose proof holds, or what the error names instead."""
    try:
        exported = tp.export_adapter(path, name, folder, model=model, force=True, **given)
    except TextPolicyError as error:
        text = str(error)
        named = [option for option in OPTIONS if option in text]
        return (named or re.findall(r"--to ([a-z]+(?:-[a-z]+)*)", text) or [f"no advice: {text}"])[
            0
        ]
    proof = exported.proof
    # The proof of `export` itself holds; an update must be there to be lost.
    assert proof.adapter_effect > 0.02 and proof.largest_difference <= proof.tolerance
    assert proof.from_merged is None or proof.from_merged < 1e-3
    return "yes"
