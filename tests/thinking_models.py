"""Chat templates of models that can think, and copies of the embedded model with such a template.

The templates switch thinking in the ways of the models that they are named for.
"""

import shutil
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from textpolicy.generation.model_files import tiny_model

_LAST_THOUGHT = (
    "{%- if loop.last %}{{- '<think>\\n' }}"
    "{{- parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' }}"
    "{{- '\\n</think>\\n\\n' }}{%- endif %}"
)
_CLOSED = "{{- '<think>\\n\\n</think>\\n\\n' }}"
_IF_OFF = "{%- if enable_thinking is defined and enable_thinking is false %}"
_OPENED = "{{- '<think>\\n' }}"


def _chatml(end: str, last_thought: str = "") -> str:
    """Return a template that writes `end` before an answer, and the thoughts of no old answer."""
    return (
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
        "{%- set parts = message.content.split('</think>') %}"
        f"{{%- if message.role == 'assistant' %}}{last_thought}{{{{- parts[-1].strip() }}}}"
        "{%- else %}{{- message.content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
        f"{end}{{%- endif %}}"
    )


TEMPLATES = {
    # The model opens its thought itself; off, the prompt has an empty thought.
    "qwen3": _chatml(f"{_IF_OFF}{_CLOSED}{{%- endif %}}", _LAST_THOUGHT),
    # The prompt opens the thought.
    "qwen3_5": _chatml(f"{_IF_OFF}{_CLOSED}{{%- else %}}{_OPENED}{{%- endif %}}", _LAST_THOUGHT),
    # The system message says which way; off is the word /no_think.
    "smollm3": (
        "{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}"
        "{{- '<|im_start|>system\\nReasoning Mode: ' }}"
        "{{- '/think' if enable_thinking else '/no_think' }}{{- '<|im_end|>\\n' }}"
        + _chatml(f"{{%- if not enable_thinking %}}{_CLOSED}{{%- endif %}}")
    ),
    # Off is a word after each message of the user, and an empty thought.
    "glm": _chatml(f"{_IF_OFF}{{{{- '<think></think>' }}}}{{%- endif %}}").replace(
        "{{- message.content }}",
        f"{{{{- message.content }}}}{_IF_OFF}{{{{- '/nothink' }}}}{{%- endif %}}",
    ),
    # A word in a message switches, and no variable.
    "nemotron": (
        "{%- set ns = namespace(enable_thinking=true) %}{%- for message in messages %}"
        "{%- if '/no_think' in message.content %}{%- set ns.enable_thinking = false %}{%- endif %}"
        "{%- endfor %}" + _chatml("{%- if ns.enable_thinking %}{{- '<think>' }}{%- endif %}")
    ),
    # Thinking is off by default.
    "granite": (
        "{%- if thinking is not defined %}{%- set thinking = false %}{%- endif %}"
        "{%- if thinking %}{{- '<|im_start|>system\\nThink first.<|im_end|>\\n' }}{%- endif %}"
        + _chatml("")
    ),
    "deepseek": (
        "{%- if not thinking is defined %}{%- set thinking = false %}{%- endif %}"
        + _chatml("{%- if thinking %}{{- '<think>' }}{%- else %}{{- '</think>' }}{%- endif %}")
    ),
    # How much, and not whether.
    "seed_oss": (
        "{%- if thinking_budget is not defined %}{%- set thinking_budget = -1 %}{%- endif %}"
        "{{- '<|im_start|>system\\nBudget: ' + thinking_budget | string + '<|im_end|>\\n' }}"
        + _chatml("")
    ),
    "gpt_oss": (
        "{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}"
        "{%- endif %}{{- '<|im_start|>system\\nReasoning: ' + reasoning_effort + '<|im_end|>\\n' }}"
        + _chatml("")
    ),
}


def write_thinking_model(folder: Path, kind: str) -> Path:
    """Write a copy of the embedded model with the template of a kind in `TEMPLATES`."""
    shutil.copytree(tiny_model(), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[kind], encoding="utf-8")
    return folder


def thinking_tokenizer(kind: str) -> TokenizerWrapper:
    """Return the embedded tokenizer with the template of a kind in `TEMPLATES`."""
    tokenizer = load_tokenizer(tiny_model())
    tokenizer.chat_template = TEMPLATES[kind]
    return tokenizer
