"""Thinking is switched by the variables that a chat template reads, and thoughts are found again.

Every prompt is compared with what transformers itself writes with the same template.
"""

from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from transformers import AutoTokenizer

from tests.thinking_models import TEMPLATES, thinking_tokenizer, write_thinking_model
from textpolicy.chat_template import argument_names
from textpolicy.errors import ConfigError, ModelError
from textpolicy.generation.mlx_generation import create_policy, load_model
from textpolicy.generation.model_files import tiny_model
from textpolicy.generation.prompts import encode_prompt
from textpolicy.generation.thinking import ThoughtReader, describe_thinking, template_arguments

SWITCHES = {
    "qwen3": "enable_thinking",
    "qwen3_5": "enable_thinking",
    "smollm3": "enable_thinking",
    "glm": "enable_thinking",
    "granite": "thinking",
    "deepseek": "thinking",
}


def prompt_of(tokenizer: TokenizerWrapper, **arguments: object) -> str:
    tokens = encode_prompt(tokenizer, "7+5=", chat_template_kwargs=arguments)
    return tokenizer.decode(tokens)


def written_by_transformers(kind: str, **arguments: object) -> list[int]:
    theirs = AutoTokenizer.from_pretrained(tiny_model())
    messages = [{"role": "user", "content": "7+5="}]
    return theirs.apply_chat_template(
        messages,
        chat_template=TEMPLATES[kind],
        add_generation_prompt=True,
        return_dict=False,
        **arguments,
    )


@pytest.mark.parametrize("kind", SWITCHES)
@pytest.mark.parametrize("way", ["on", "off"])
def test_each_setting_is_exactly_what_the_template_writes(kind: str, way: str) -> None:
    tokenizer = thinking_tokenizer(kind)
    arguments = template_arguments(tokenizer, None, way)
    assert arguments == {SWITCHES[kind]: way == "on"}
    tokens = encode_prompt(tokenizer, "7+5=", chat_template_kwargs=arguments)
    assert tokens == written_by_transformers(kind, **arguments)
    assert describe_thinking(tokenizer, arguments) == (
        f"thinking: {way} ({SWITCHES[kind]} is {str(way == 'on').lower()})"
    )


@pytest.mark.parametrize("kind", SWITCHES)
def test_a_prompt_with_thinking_off_has_no_open_thought(kind: str) -> None:
    tokenizer = thinking_tokenizer(kind)
    arguments = template_arguments(tokenizer, None, "off")
    text = prompt_of(tokenizer, **arguments)
    assert text.count("<think>") <= text.count("</think>")
    tokens = encode_prompt(tokenizer, "7+5=", chat_template_kwargs=arguments)
    assert not ThoughtReader(tokenizer, arguments).begins_inside(tokens)


@pytest.mark.parametrize("kind", SWITCHES)
def test_without_a_setting_the_template_has_its_own_default_which_is_said(kind: str) -> None:
    tokenizer = thinking_tokenizer(kind)
    assert template_arguments(tokenizer) == {}
    assert encode_prompt(tokenizer, "7+5=") == written_by_transformers(kind)
    own, other = ("off", "on") if kind in ("granite", "deepseek") else ("on", "off")
    said = describe_thinking(tokenizer, {})
    assert (
        said == f"thinking: {own}, the default of the chat template; --thinking {other} changes it"
    )


def test_tokens_for_thoughts_do_not_turn_thinking_on() -> None:
    tokenizer = thinking_tokenizer("deepseek")
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer = TokenizerWrapper(tokenizer._tokenizer)
    assert tokenizer.has_thinking
    assert prompt_of(tokenizer).endswith("assistant\n</think>")


def test_a_model_that_cannot_be_switched_is_refused_with_what_its_template_reads() -> None:
    with pytest.raises(ConfigError) as error:
        template_arguments(thinking_tokenizer("gpt_oss"), None, "off")
    assert str(error.value) == (
        "thinking is 'off', but the model's chat template has no switch for it, such as "
        "enable_thinking or thinking. The template reads: reasoning_effort. reasoning_effort says "
        "how much the model thinks: --template-args reasoning_effort=low"
    )
    with pytest.raises(ConfigError, match="--template-args thinking_budget=512"):
        template_arguments(thinking_tokenizer("seed_oss"), None, "off")
    with pytest.raises(ConfigError, match="looks for /no_think in a message: --system /no_think"):
        template_arguments(thinking_tokenizer("nemotron"), None, "off")
    with pytest.raises(ConfigError, match="The template reads no arguments"):
        template_arguments(load_tokenizer(tiny_model()), None, "on")
    bare = load_tokenizer(tiny_model())
    bare.chat_template = None
    bare = TokenizerWrapper(bare._tokenizer)
    with pytest.raises(ConfigError, match="no chat template"):
        template_arguments(bare, None, "on")
    with pytest.raises(ConfigError, match="no chat template"):
        template_arguments(bare, {"thinking": True})


def test_an_amount_of_thinking_is_an_argument_and_is_said() -> None:
    tokenizer = thinking_tokenizer("gpt_oss")
    arguments = template_arguments(tokenizer, {"reasoning_effort": "low"})
    assert "Reasoning: low" in prompt_of(tokenizer, **arguments)
    assert describe_thinking(tokenizer, arguments) == "thinking: reasoning_effort is 'low'"
    assert "as the chat template does by itself" in str(describe_thinking(tokenizer, {}))
    assert describe_thinking(load_tokenizer(tiny_model()), {}) is None


def test_a_switch_that_changes_nothing_is_refused() -> None:
    tokenizer = load_tokenizer(tiny_model())
    tokenizer.chat_template = "{% if enable_thinking %}{% endif %}{{ messages[0].content }}"
    with pytest.raises(ConfigError, match="the same prompt for enable_thinking true and false"):
        template_arguments(tokenizer, None, "on")
    assert "changes nothing" in str(describe_thinking(tokenizer, {}))


@pytest.mark.parametrize(
    "arguments, part",
    [
        (
            {"enable_thinkin": True},
            "names 'enable_thinkin', which .* The template reads: enable_th",
        ),
        ({"messages": []}, "names 'messages'"),
        ({"chat_template": "{{ 1 }}"}, "names 'chat_template'"),
        ({"bos_token": "x"}, "names 'bos_token'"),
        ({"enable_thinking": "false"}, "enable_thinking = 'false'; expected true or false"),
    ],
)
def test_an_argument_that_the_template_does_not_take_is_refused(
    arguments: dict[str, object], part: str
) -> None:
    tokenizer = thinking_tokenizer("qwen3")
    with pytest.raises(ConfigError, match=part):
        template_arguments(tokenizer, arguments)
    with pytest.raises(ConfigError, match="which is the same switch"):
        template_arguments(tokenizer, {"enable_thinking": True}, "on")


def test_a_template_cannot_let_a_caller_replace_it_or_its_control_tokens() -> None:
    tokenizer = load_tokenizer(tiny_model())
    tokenizer.chat_template = "{{ chat_template }}{{ eos_token }}{{ tokenize }}{{ mode }}"
    assert argument_names(tokenizer) == {"mode"}


def test_a_template_that_ends_only_without_the_arguments_is_refused() -> None:
    tokenizer = load_tokenizer(tiny_model())
    tokenizer.chat_template = "{{ 'a' * size }}"
    assert template_arguments(tokenizer, {"size": 2}) == {"size": 2}
    with pytest.raises(ModelError, match="does not come to an end"):
        template_arguments(tokenizer, {"size": 10**10})
    tokenizer.chat_template = "{% if enable_thinking %}{{ 'a' * 10**10 }}{% endif %}"
    with pytest.raises(ModelError, match="does not come to an end"):
        template_arguments(tokenizer)


def test_arguments_cannot_spell_control_tokens_unless_allowed() -> None:
    tokenizer = load_tokenizer(tiny_model())
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{{ note }}{{ table | default({}) | tojson }}"
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for note in ("<|im_end|>", "a<|im_end", "|im_end|>", ["<|im_end|>"]):
        for table in ({}, {"k": "<|im_end|>"}, {"<|im_end|>": 1}):
            given = {"note": note, "table": table}
            tokens = encode_prompt(tokenizer, "x<|im_", chat_template_kwargs=given)
            assert tokens.count(end) == 1, given
    allowed = {"allow_special_tokens": True, "chat_template_kwargs": {"note": "<|im_end|>"}}
    assert encode_prompt(tokenizer, "x", **allowed).count(end) == 2


def test_a_prompt_opens_a_thought_only_by_what_the_template_writes() -> None:
    tokenizer = thinking_tokenizer("qwen3_5")
    on, off = {"enable_thinking": True}, {"enable_thinking": False}
    for text in ("7+5=", "<think>", "</think>", "<think>\n"):
        for arguments, opened in ((on, True), (off, False), ({}, True)):
            tokens = encode_prompt(tokenizer, text, chat_template_kwargs=arguments)
            assert ThoughtReader(tokenizer, arguments).begins_inside(tokens) is opened, text


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("opening", ["<think>", "<seed:think>", "[THINK]"])
def test_marks_that_are_tokens_are_found_in_prompts_and_completions(
    special: bool, opening: str
) -> None:
    closing = f"{opening[0]}/{opening[1:]}"
    inner = thinking_tokenizer("qwen3_5")._tokenizer
    inner.chat_template = inner.chat_template.replace("<think>", opening)
    inner.add_tokens([opening, closing], special_tokens=special)
    tokenizer = TokenizerWrapper(inner)
    reader = ThoughtReader(tokenizer)
    prompt = encode_prompt(tokenizer, f"{opening}7+5=")
    assert prompt[-2] == tokenizer.convert_tokens_to_ids(opening)
    assert reader.begins_inside(prompt)
    assert not reader.begins_inside(encode_prompt(tokenizer, opening)[:-2])
    tokens = tokenizer.encode(f"so 12{closing} 12<|im_end|>", add_special_tokens=False)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert (closing in text) is not special
    assert reader.split(tokens, text, in_thought=True) == ("so 12", "12")
    unclosed = tokens[:3]
    text = tokenizer.decode(unclosed, skip_special_tokens=True)
    assert reader.split(unclosed, text, in_thought=True)[1] == ""


def test_marks_of_several_tokens_around_thought_and_answer_are_found() -> None:
    inner = thinking_tokenizer("qwen3")._tokenizer
    names = ["<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"]
    inner.add_tokens(names, special_tokens=True)
    inner.chat_template = (
        "{% for m in messages %}<|open|>{{ m.role }}<|sep|>{{ m.content }}<|end_of_msg|>"
        "{% endfor %}<|open|>{{ 'think' if thinking else 'response' }}<|sep|>"
    )
    tokenizer = TokenizerWrapper(inner)
    for way in (True, False):
        reader = ThoughtReader(tokenizer, {"thinking": way})
        prompt = encode_prompt(tokenizer, "7+5=", chat_template_kwargs={"thinking": way})
        assert reader.begins_inside(prompt) is way
    answer = "so<|close|>think<|sep|><|open|>response<|sep|>12<|close|>response<|sep|><|im_end|>"
    tokens = tokenizer.encode(answer, add_special_tokens=False)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert reader.split(tokens, text, in_thought=True) == ("so", "12")


def test_a_policy_tells_the_thought_and_the_answer_apart(tmp_path: Path) -> None:
    model, tokenizer = load_model(write_thinking_model(tmp_path / "model", "qwen3_5"))
    for way, opened in ((True, True), (False, False)):
        given = {"enable_thinking": way}
        policy = create_policy(
            model, tokenizer, {"max_tokens": 4, "temperature": 0}, chat_template_kwargs=given
        )
        ((one,),) = policy.generate(["347+185="])
        assert tokenizer.decode(one.prompt_tokens).endswith("<think>\n" if way else "</think>\n\n")
        assert one.in_thought is opened
        assert one.answer == ("" if opened else one.text)
    with pytest.raises(ConfigError, match="does not read"):
        create_policy(model, tokenizer, chat_template_kwargs={"thinking": True})
