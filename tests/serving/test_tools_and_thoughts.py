"""Tools reach the chat template; calls and thoughts come apart from the answer."""

import json

import pytest

from tests.serving.conftest import serving
from tests.serving.scripted_model import ScriptedModel
from tests.thinking_models import TEMPLATES, thinking_tokenizer
from textpolicy.generation.prompts import encode_prompt
from textpolicy.serving.engine_queue import ServedEngine

TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}},
    }
]
# As Qwen3 writes tools, calls and results.
TOOL_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n{%- for tool in tools %}{{ tool | tojson }}{% endfor -%}"
    "<|im_end|>\n{%- endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{%- for tool_call in message.tool_calls or [] %}{%- set tool_call = tool_call.function %}"
    '<tool_call>\n{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}'
    "\n</tool_call>{%- endfor %}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 7}}\n</tool_call>'
ASKED = [{"role": "user", "content": "2+5"}]


def tool_tokenizer():
    """Return the embedded tokenizer with a template for tools, as mlx-lm would load it."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.tool_parsers import json_tools

    inner = thinking_tokenizer("granite")._tokenizer
    inner.chat_template = TOOL_TEMPLATE
    return TokenizerWrapper(
        inner,
        tool_call_start=json_tools.tool_call_start,
        tool_call_end=json_tools.tool_call_end,
        tool_parser=json_tools.parse_tool_call,
    )


@pytest.fixture(scope="module")
def model(load_tiny):
    return load_tiny()[0]


@pytest.fixture
def saying(model):
    """Return a function that serves a model which says a text after a prompt, and is asked."""

    def ask(tokenizer, text, function, **arguments):
        prompt = encode_prompt(tokenizer, ASKED, chat_template_kwargs=arguments)
        script = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        scripted = ScriptedModel(model, script, start=len(prompt))
        served = ServedEngine(scripted, tokenizer)
        served.put("m", scripted, version=0)
        with serving(served) as server:
            return server.ask(function)

    return ask


def chat(client, **options):
    return client.chat.completions.create(model="m", messages=ASKED, max_tokens=200, **options)


def streamed(client, **options):
    """Return the joined fields of all deltas of a stream, and its finish reason."""
    fields: dict = {"content": "", "reasoning_content": "", "calls": []}
    reason = None
    for chunk in chat(client, stream=True, **options):
        (choice,) = chunk.choices
        fields["content"] += choice.delta.content or ""
        fields["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
        fields["calls"] += choice.delta.tool_calls or []
        reason = choice.finish_reason or reason
    return fields, reason


@pytest.mark.parametrize("before", ["", "I add. "])
def test_a_tool_call_is_read_and_streamed(saying, before):
    whole, (fields, reason) = saying(
        tool_tokenizer(),
        before + CALL,
        lambda client: (chat(client, tools=TOOLS), streamed(client, tools=TOOLS)),
        tools=TOOLS,
    )
    (choice,) = whole.choices
    assert choice.finish_reason == reason == "tool_calls"
    assert (choice.message.content or "").strip() == before.strip() == fields["content"].strip()
    for (call,) in (choice.message.tool_calls, fields["calls"]):
        assert call.function.name == "add" and json.loads(call.function.arguments) == {"a": 7}
        assert call.id.startswith("call_")


@pytest.mark.parametrize("text", ["<tool_call>\n{no json}\n</tool_call>", "<tool_call>\n{"])
def test_a_call_that_cannot_be_read_stays_text(saying, text):
    whole, (fields, reason) = saying(
        tool_tokenizer(),
        text,
        lambda client: (chat(client, tools=TOOLS), streamed(client, tools=TOOLS)),
        tools=TOOLS,
    )
    assert whole.choices[0].message.content == fields["content"] == text
    assert whole.choices[0].finish_reason == reason == "stop"


def test_without_tools_a_call_is_text(saying):
    answer = saying(tool_tokenizer(), CALL, lambda client: chat(client))
    assert answer.choices[0].message.content == CALL
    assert answer.choices[0].message.tool_calls is None


def test_calls_and_results_are_written_by_the_template(saying):
    tokenizer = tool_tokenizer()
    call = {"name": "add", "arguments": '{"a": 7}'}
    messages = [
        *ASKED,
        {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "c1", "content": "7"},
    ]

    def ask(client):
        ids = {"return_token_ids": True}
        answer = client.chat.completions.create(
            model="m", messages=messages, tools=TOOLS, max_tokens=1, extra_body=ids
        )
        none = client.chat.completions.create(
            model="m", messages=ASKED, tools=TOOLS, tool_choice="none", max_tokens=1, extra_body=ids
        )
        return answer.prompt_token_ids, none.prompt_token_ids

    with_tools, without = (tokenizer.decode(ids) for ids in saying(tokenizer, "7", ask))
    assert '"name": "add"' in with_tools.partition("<|im_start|>user")[0]
    assert f"<|im_start|>assistant\n{CALL}<|im_end|>" in with_tools
    assert "<|im_start|>tool\n7<|im_end|>" in with_tools
    assert '"add"' not in without


@pytest.mark.parametrize(
    ("kind", "text", "thought", "answer"),
    [
        ("qwen3", "<think>\nTwo and five.\n</think>\n\n7", "Two and five.", "7"),
        ("qwen3_5", "Two and five.\n</think>\n\n7", "Two and five.", "7"),
        ("qwen3_5", "Two and fi", "Two and fi", ""),
        ("qwen3", "7 < 8 <th", "", "7 < 8 <th"),
        ("qwen3", " 7 \n", "", " 7 \n"),
    ],
)
def test_a_thought_is_apart_from_the_answer(saying, kind, text, thought, answer):
    assert kind in TEMPLATES
    tokenizer = thinking_tokenizer(kind)
    whole, (fields, _) = saying(tokenizer, text, lambda client: (chat(client), streamed(client)))
    message = whole.choices[0].message
    assert (message.content, fields["content"]) == (answer, answer)
    assert (getattr(message, "reasoning_content", ""), fields["reasoning_content"]) == (
        thought,
        thought,
    )
