"""The Modelfile of an Ollama export: its grammar, its template, its stop texts and its system."""

import json
import re

import jinja2
import pytest

import textpolicy as tp
from textpolicy.export.asking import Asking
from textpolicy.export.modelfile import chat_texts, modelfile
from textpolicy.generation.mlx_generation import load_model

COMMANDS = {
    *("from", "license", "template", "system", "adapter", "renderer", "parser", "parameter"),
    *("message", "requires"),
}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BEGIN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe nice.<|im_end|>\n{% endif %}"
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}[Q] {{ m.content }} [/Q]"
    "{% elif m.role == 'system' %}<<{{ m.content }}>>\n{% else %}{{ m.content }}#{% endif %}"
    "{% endfor %}"
)
# Qwen3 drops the thoughts of earlier answers, and writes empty ones for the last.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}"
)
TRIMMED = CHATML.replace("m.content", "m.content | trim")
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('no') }}{% endif %}[{{ m.content }}]{% endfor %}"
)


def parse(text):
    """Return the commands of a Modelfile as Ollama's parser reads them, or raise ValueError.

    A value is a line, or a text in double or triple quotes, which may have several lines.
    Characters that Go does not print are dropped.
    """
    commands, rest = [], text
    while rest := rest.lstrip():
        if rest.startswith("#"):
            _, _, rest = rest.partition("\n")
            continue
        name, rest = re.fullmatch(r"([A-Za-z]+)[ \t]+(.*)", rest, re.DOTALL).groups()
        if name.lower() not in COMMANDS:
            raise ValueError(f"no command {name}")
        key = name.lower()
        if key == "parameter":
            key, rest = re.fullmatch(r"([A-Za-z0-9_]+)[ \t]+(.*)", rest, re.DOTALL).groups()
        for quote in ('"""', '"'):
            if rest.startswith(quote):
                value, closed, rest = rest.removeprefix(quote).partition(quote)
                if not closed or (rest and not rest[0].isspace()):
                    raise ValueError(f"the quote of {name} does not end")
                break
        else:
            value, _, rest = rest.partition("\n")
        commands.append((key, "".join(c for c in value if c.isprintable() or c in "\n\t")))
    if not any(key == "from" for key, _ in commands):
        raise ValueError("no FROM line")
    return commands


def render_go(template, messages):
    """Return what Go's template engine writes, for the few actions that our templates have."""
    head, body, tail = re.fullmatch(
        r"(\{\{- range \.Messages \}\})(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL
    ).groups()
    assert head
    branches = re.split(r"\{\{ (?:else )?if eq \.Role \"(\w+)\" \}\}", body)
    assert branches[0] == ""
    texts = dict(zip(branches[1::2], branches[2::2], strict=True))
    assert "{{" not in "".join(texts.values()).replace("{{ .Content }}", "") + tail
    return (
        "".join(texts[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + tail
    )


@pytest.fixture
def with_template():
    """Return a function that returns the embedded tokenizer with another chat template."""
    _, tokenizer = load_model("tiny")

    def change(template):
        tokenizer._tokenizer.chat_template = template
        tokenizer.chat_template = template
        return tokenizer

    return change


CONVERSATION = [
    {"role": "user", "content": "What is <b> & 'c'?"},
    {"role": "assistant", "content": " It is\n\nthis. "},
    {"role": "user", "content": "{x}"},
]


@pytest.mark.parametrize(
    "template",
    [CHATML + BEGIN, DEFAULT + CHATML + BEGIN, BRACKETS, THINKING + BEGIN],
    ids=["chatml", "with a system message of its own", "brackets", "thinking"],
)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_template_of_ollama_writes_what_the_chat_template_writes(
    template, system, with_template
):
    tokenizer = with_template(template)
    commands = dict(parse(modelfile(tokenizer, Asking(), [])))
    messages = [{"role": "system", "content": system}, *CONVERSATION] if system else CONVERSATION
    # Ollama puts the SYSTEM of the Modelfile before a conversation without a system message.
    own = [] if system or "system" not in commands else [commands["system"]]
    given = [*({"role": "system", "content": text} for text in own), *messages]
    expected = jinja2.Template(template).render(messages=messages, add_generation_prompt=True)
    assert render_go(commands["template"], given) == expected


SWITCHED = CHATML + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not thinking %}<think></think>{% endif %}{% endif %}"
)


@pytest.mark.parametrize("thinking", [True, False])
def test_the_template_of_ollama_has_the_arguments_that_the_run_gave(thinking, with_template):
    asking = Asking(arguments={"thinking": thinking})
    commands = dict(parse(modelfile(with_template(SWITCHED), asking, [])))
    ending = "<|im_start|>assistant\n" + ("" if thinking else "<think></think>")
    assert render_go(commands["template"], CONVERSATION).endswith(f"<|im_end|>\n{ending}")


@pytest.mark.parametrize("template", [TRIMMED + BEGIN, ALTERNATING, "{{ messages[0].content }}"])
def test_a_template_that_is_not_certain_is_left_out_and_said(template, with_template):
    tokenizer, notes = with_template(template), []
    assert chat_texts(tokenizer) is None
    assert "template" not in dict(parse(modelfile(tokenizer, Asking(), notes)))
    assert "no TEMPLATE" in notes[0]


def test_a_model_without_a_chat_template_gets_the_bare_prompt(with_template):
    tokenizer = with_template(None)
    tokenizer.has_chat_template = False
    assert dict(parse(modelfile(tokenizer, Asking(), [])))["template"] == "{{ .Prompt }}"


@pytest.mark.parametrize(
    ("system", "written"),
    [
        ("Answer with a number.", True),
        ("Two lines:\n\n- 'one'\n- \"two\".", True),
        ('Never write """ in an answer.', False),
        ('Say "yes"', False),
        ("A family \U0001f468\u200d\U0001f469", False),
    ],
)
def test_a_system_message_is_written_unchanged_or_left_out(system, written, with_template):
    notes = []
    commands = dict(parse(modelfile(with_template(CHATML + BEGIN), Asking(system=system), notes)))
    assert commands.get("system") == (system if written else None)
    assert written or "no SYSTEM" in notes[0]


def test_an_export_has_the_modelfile_of_its_run(trained, tmp_path):
    exported = tp.export_adapter(trained(None, 0.05), "ollama", tmp_path / "out", model="tiny")
    commands = parse((tmp_path / "out" / "Modelfile").read_text())
    assert commands[0] == ("from", "./model.gguf") and (tmp_path / "out" / "model.gguf").exists()
    assert ("stop", "<|im_end|>") in commands and ("repeat_penalty", "1") in commands
    assert not any(name == "adapter" for name, _ in commands)
    assert exported.commands[0].startswith("ollama create ")
    assert json.loads((tmp_path / "out" / "export.json").read_text())["format"] == "ollama"
