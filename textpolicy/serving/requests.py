"""The bodies of requests, read and checked: what is asked, and the prompts before tokenization."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textpolicy.serving.body_fields import (
    BOOL,
    BodyFields,
    is_text,
    number,
    whole_number,
    wrong_value,
)
from textpolicy.serving.conversations import read_messages, read_tools
from textpolicy.serving.refusal import RefusalError
from textpolicy.types import Sampling

MAX_CHOICES = 128
MAX_PROMPTS = 256
MAX_TOP_LOGPROBS = 20
_MAX_STOPS, _MAX_STOP_CHARACTERS, _MAX_STOP_TOKENS = 16, 256, 128
_MAX_TOKENS = 2**31 - 1
# Parameters that identify the caller or steer another company's machines.
_IRRELEVANT = (
    *("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("request_id", "priority", "cache_salt"),
)
_ONLY = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "prompt_logprobs": (0,),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# About the text of an answer, which token ids do not have, and about parts of vLLM's own answers.
_WITHOUT_TEXT = {
    *("output_kind", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
    *("max_completion_tokens", "routed_experts_prompt_start"),
}
_WHY = "this server cannot do what another value asks for"

RawPrompt = str | list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What all kinds of requests ask for. `max_tokens` is None if the client names no limit.

    `logprobs` is the number of likeliest tokens to show for each token, or None for none at all.
    """

    model: str
    sampling: Sampling
    max_tokens: int | None
    seed: int
    n: int = 1
    stop_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    tokens_as_ids: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """A request to continue a conversation. `tools` is empty if the model may call none."""

    asked: Asked
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    chat_template_kwargs: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionRequest:
    """A request to continue prompts, each a text or token ids."""

    asked: Asked
    prompts: Sequence[RawPrompt]


def read_chat_request(body: Any) -> ChatRequest:
    """Return what the body of /v1/chat/completions asks for, or raise `RefusalError`."""
    fields = BodyFields(body)
    wanted = fields.take("logprobs", BOOL, False)
    top = fields.take("top_logprobs", whole_number(0, MAX_TOP_LOGPROBS))
    if top and not wanted:
        raise RefusalError("top_logprobs needs logprobs to be true as well", param="top_logprobs")
    _check_formats(fields)
    request = ChatRequest(
        messages=read_messages(fields.raw("messages")),
        tools=read_tools(fields),
        chat_template_kwargs=_template_arguments(fields),
        asked=_read_asked(fields, logprobs=(top or 0) if wanted else None),
    )
    fields.refuse_unless(
        {"add_generation_prompt": (True,), "continue_final_message": (False,), "echo": (False,)},
        "the answer is always the next message",
    )
    fields.finish()
    return request


def read_completion_request(body: Any) -> CompletionRequest:
    """Return what the body of /v1/completions asks for, or raise `RefusalError`."""
    fields = BodyFields(body)
    request = CompletionRequest(
        prompts=_read_prompts(fields.raw("prompt")),
        asked=_read_asked(
            fields, logprobs=fields.take("logprobs", whole_number(0, MAX_TOP_LOGPROBS))
        ),
    )
    fields.refuse_unless({"echo": (False,), "suffix": ("",), "best_of": (request.asked.n,)}, _WHY)
    fields.finish()
    return request


def read_generate_request(body: Any) -> CompletionRequest:
    """Return what the body of vLLM's /inference/v1/generate asks for: token ids in and out."""
    outer = BodyFields(body)
    prompt = outer.raw("token_ids")
    if not _is_token_list(prompt):
        raise wrong_value("token_ids", prompt, "a list of token ids, at least one")
    given = outer.raw("sampling_params")
    if isinstance(given, dict):
        given = {name: value for name, value in given.items() if name not in _WITHOUT_TEXT}
    inner = BodyFields({} if given is None else given, "sampling_params")
    model = outer.required_text("model")
    logprobs = inner.take("logprobs", whole_number(0, MAX_TOP_LOGPROBS))
    stream = outer.take("stream", BOOL, False)
    asked = _read_asked(inner, logprobs=logprobs, model=model, stream=stream)
    inner.finish()
    outer.ignore("stream_options", "features", "kv_transfer_params", *_IRRELEVANT)
    outer.finish()
    return CompletionRequest(prompts=[prompt], asked=asked)


def _read_asked(
    fields: BodyFields, *, logprobs: int | None, model: str | None = None, stream: bool = False
) -> Asked:
    """Read what all kinds of requests share."""
    fields.ignore(*_IRRELEVANT)
    fields.refuse_unless(_ONLY, _WHY)
    # Another temperature near zero would overflow the logits.
    temperature = fields.take("temperature", number(0, 100), 1.0)
    if 0 < temperature < 0.001:
        raise wrong_value("temperature", temperature, "0 (greedy) or a number from 0.001 to 100")
    top_k = fields.take("top_k", whole_number(-1, _MAX_TOKENS), 0)
    sampling = Sampling(
        temperature=temperature,
        top_p=fields.take("top_p", number(0.001, 1), 1.0),
        top_k=max(0, top_k),
        min_p=fields.take("min_p", number(0, 0.999), 0.0),
        repetition_penalty=fields.take("repetition_penalty", number(0.01, 100), 1.0),
        stop=_read_stop(fields.raw("stop")),
    )
    seed = fields.take("seed", whole_number(-(2**63), 2**64 - 1))
    options = BodyFields(fields.raw("stream_options") or {}, "stream_options")
    asked = Asked(
        model=fields.required_text("model") if model is None else model,
        sampling=sampling,
        max_tokens=_read_max_tokens(fields),
        seed=secrets.randbits(63) if seed is None else seed,
        n=fields.take("n", whole_number(1, MAX_CHOICES), 1),
        stop_tokens=_read_stop_tokens(fields.raw("stop_token_ids")),
        logprobs=logprobs,
        stream=fields.take("stream", BOOL, stream),
        include_usage=options.take("include_usage", BOOL, False),
        return_token_ids=fields.take("return_token_ids", BOOL, False),
        tokens_as_ids=fields.take("return_tokens_as_token_ids", BOOL, False),
    )
    options.ignore("include_obfuscation", "continuous_usage_stats")
    options.finish()
    return asked


def _read_max_tokens(fields: BodyFields) -> int | None:
    names = ("max_tokens", "max_completion_tokens")
    given = {name: fields.take(name, whole_number(1, _MAX_TOKENS)) for name in names}
    numbers = {number for number in given.values() if number is not None}
    if len(numbers) > 1:
        raise RefusalError(
            f"max_tokens is {given['max_tokens']} and max_completion_tokens is "
            f"{given['max_completion_tokens']}; both mean the same limit, so give one of them",
            param="max_completion_tokens",
        )
    return next(iter(numbers), None)


def _read_stop(given: Any) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else [] if given is None else given
    right = isinstance(texts, list) and len(texts) <= _MAX_STOPS
    if not right or not all(
        is_text(text) and 0 < len(text) <= _MAX_STOP_CHARACTERS for text in texts
    ):
        raise wrong_value(
            "stop",
            given,
            f"a text, or up to {_MAX_STOPS} texts, each of 1 to {_MAX_STOP_CHARACTERS} characters",
        )
    return tuple(texts)


def _read_stop_tokens(given: Any) -> frozenset[int]:
    if given is not None and not (given == [] or _is_token_list(given)):
        raise wrong_value("stop_token_ids", given, "a list of token ids")
    if len(given or ()) > _MAX_STOP_TOKENS:
        raise wrong_value("stop_token_ids", given, f"at most {_MAX_STOP_TOKENS} token ids")
    return frozenset(given or ())


def _read_prompts(given: Any) -> list[RawPrompt]:
    """Return the prompts of a text, a list of token ids, or a list of either."""
    if _is_text_prompt(given) or _is_token_list(given):
        return [given]
    several = isinstance(given, list) and 0 < len(given) <= MAX_PROMPTS
    if several and (all(map(_is_text_prompt, given)) or all(map(_is_token_list, given))):
        return list(given)
    raise wrong_value(
        "prompt",
        given,
        "a text that is not empty, a list of token ids, or a list of up to "
        f"{MAX_PROMPTS} of either",
    )


def _is_text_prompt(value: Any) -> bool:
    return is_text(value) and bool(value)


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _check_formats(fields: BodyFields) -> None:
    form = fields.raw("response_format")
    kind = form.get("type") if isinstance(form, dict) else form
    if kind not in (None, "text"):
        raise RefusalError(
            f"response_format is {str(kind)[:60]!r}; answers are not constrained here, so only "
            "'text' can be honoured. Ask for the form in a message, and check the answer",
            param="response_format",
            code="unsupported_parameter",
        )
    if fields.raw("modalities") not in (None, ["text"]):
        raise wrong_value("modalities", fields.raw("modalities"), "only ['text']")


def _template_arguments(fields: BodyFields) -> dict[str, Any]:
    """Return the arguments of the chat template. Whether it reads them is checked later."""
    given = fields.raw("chat_template_kwargs")
    given = {} if given is None else given
    if not isinstance(given, dict) or len(given) > 16 or not all(map(is_text, given)):
        raise wrong_value("chat_template_kwargs", given, "an object of up to 16 arguments")
    for name, value in given.items():
        # A template may repeat something as often as an argument says.
        small = isinstance(value, bool) or is_text(value)
        if not small and not (isinstance(value, int | float) and abs(value) <= 1e6):
            raise wrong_value(
                f"chat_template_kwargs.{name}",
                value,
                "true, false, a text, or a number up to a million",
            )
    effort = fields.raw("reasoning_effort")
    if effort is not None and not is_text(effort):
        raise wrong_value("reasoning_effort", effort, "a text, such as 'low'")
    return dict(given) | ({} if effort is None else {"reasoning_effort": effort})
