"""Two hundred broken and hostile requests, as JSON bodies and as raw bytes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CHAT, TEXT, IDS = "/v1/chat/completions", "/v1/completions", "/inference/v1/generate"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ASKED = [{"role": "user", "content": "1+1="}]
SOUND: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": ASKED, "max_tokens": 2},
    TEXT: {"model": "tiny", "prompt": "1+1=", "max_tokens": 2},
    IDS: {"model": "tiny", "token_ids": [17, 10, 17], "sampling_params": {"max_tokens": 2}},
    LOAD: {"lora_name": "evil", "lora_path": "/etc"},
    UNLOAD: {"lora_name": "evil"},
}


@dataclass(frozen=True)
class HostileRequest:
    """One request to post. If `refused`, it must get a status from 400 to 499."""

    path: str
    body: bytes
    refused: bool = True


def changed(path: str, refused: bool = True, **fields: Any) -> HostileRequest:
    """Return a sound request with other fields."""
    return HostileRequest(path, json.dumps(SOUND[path] | fields).encode(), refused)


def no_json() -> Iterator[HostileRequest]:
    bodies = [
        b"", b"{", b"null", b"[]", b'"text"', b"1", b"{}", b"\xff\xfe", b"\x00" * 100,
        b'{"model": NaN}', b'{"model": 1e999}', b"[" * 100_000, b'{"a":' * 5000,
        b'{"model": "tiny", "model": ', b"model=tiny&prompt=a", "{“model”: 1}".encode(),
    ]  # fmt: skip
    for path in (CHAT, TEXT, IDS, LOAD):
        yield from (HostileRequest(path, body) for body in bodies)


WRONG: dict[str, list[Any]] = {
    "model": [None, "", 7, [], {}, "../../etc/passwd", "tiny\x00", "\ud800", "t" * 100_000],
    "max_tokens": [0, -1, 2.5, "4", [], True, 2**31, 2**70, 1e308],
    "temperature": [-1, 1e308, "1", [], True, 1e-300, -0.001],
    "top_p": [-1, 0, 1.5, "1", [], 1e-300],
    "n": [0, -1, 1.5, "2", 10**9, 129, [2], False],
    "seed": [1.5, "1", [], 2**64, -(2**64), True],
    "stop": [7, {}, [7], [""], ["a"] * 17, "a" * 300, [["a"]], "\ud800"],
    "stop_token_ids": ["1", [1.5], [[1]], [True], list(range(1000))],
    "top_k": [-2, 1.5, "1", 2**40],
    "min_p": [-1, 1, "0", []],
    "repetition_penalty": [0, -1, 1e308, "1"],
    "logit_bias": [{"1": 100}],
    "response_format": [{"type": "json_schema"}, 7, [{}]],
    "stream": ["yes", 1, []],
    "stream_options": [7, {"nix": 1}],
    "__proto__": [{"a": 1}],
}
WRONG_CHAT: dict[str, list[Any]] = {
    "messages": [
        None, [], "text", {}, [[]], ["a"], [{}], [{"role": "user"}] * 5000, [{"role": 7}],
        [{"role": "root", "content": "a"}], [{"role": "user", "content": 7}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}],
        [{"role": "user", "content": "\ud800"}], [{"role": "user", "content": "a" * 100_000}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": 7}], [{"role": "assistant", "tool_calls": [7]}],
    ],
    "logprobs": [1, "yes", []],
    "top_logprobs": [-1, 21, 5, "a"],
    "tools": [7, ["f"], [{}], [{"function": {}}], [{"function": {"name": "f"}}]],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}, "auto"],
    "chat_template_kwargs": [
        7, [], {"messages": []}, {"nix": 1}, {"chat_template": "{{ 1 }}"}, {"tools": []},
        {"add_generation_prompt": False}, {"enable_thinking": "a" * 10_000},
    ],
    "echo": [True],
}  # fmt: skip
WRONG_TEXT: dict[str, list[Any]] = {
    "prompt": [
        None, "", [], 7, {}, [[]], [[], [1]], ["a", 1], ["a", ""], [1, "a"], [[1], "a"], [True],
        [-1], [320], [2**70], [1.5], [[1], [10**6]], "a" * 100_000, ["a"] * 257, [1] * 5000,
        "\ud800",
    ],
    "logprobs": [True, -1, 21, "5"],
    "suffix": ["end"],
    "best_of": [2],
}  # fmt: skip
ODD_BUT_ALLOWED = [
    changed(CHAT, False, temperature=0, top_p=0.001, top_k=1, min_p=0.999, repetition_penalty=100),
    changed(CHAT, False, temperature=100, n=128, max_tokens=1),
    changed(CHAT, False, stop=[chr(65 + letter) for letter in range(16)], max_tokens=40),
    changed(CHAT, False, messages=[{"role": "user", "content": "<|im_end|>" * 50}]),
    changed(CHAT, False, messages=[{"role": "tool", "content": "𗀀" * 100}, *ASKED]),
    changed(CHAT, False, messages=[{"role": "user", "content": "{{ 7 * 7 }}{% for %}"}]),
    changed(CHAT, False, messages=ASKED * 40, logprobs=True, top_logprobs=20),
    changed(CHAT, False, seed=-(2**63), stream_options={"include_usage": True}, user="\x00"),
    changed(TEXT, False, prompt=[[0]] * 64, n=4, max_tokens=1),
    changed(TEXT, False, prompt="\u202e\u0000\uffff", logprobs=20),
    changed(TEXT, False, stop_token_ids=[0, 10**9], max_tokens=40),
    changed(IDS, False, token_ids=[319] * 1000, sampling_params={"max_tokens": 24}),
]
NO_PATHS = ["", "/", "/v1", "/v1/models/../../etc/passwd", "/%2e%2e/", "/v1/chat/completions/x"]

POSTED = [
    *no_json(),
    *(changed(path, **{n: v}) for path in (CHAT, TEXT) for n, some in WRONG.items() for v in some),
    *(changed(CHAT, **{name: value}) for name, some in WRONG_CHAT.items() for value in some),
    *(changed(TEXT, **{name: value}) for name, some in WRONG_TEXT.items() for value in some),
    *(changed(IDS, token_ids=ids) for ids in (None, [], "a", [[1]], [-1], [320], [1] * 3000)),
    *(changed(IDS, sampling_params=one) for one in (7, [], {"n": -1}, {"nix": 1})),
    *(changed(LOAD, lora_path=path) for path in ("/", "..", "~", "hf/model", "\x00", "/proc/self")),
    *(changed(LOAD, lora_name=name) for name in ("", "tiny", "a\nb", "a" * 200, 7)),
    *(changed(UNLOAD, lora_name=name) for name in ("", "tiny", "nix", None)),
    *(HostileRequest(path, b"{}") for path in NO_PATHS),
    *ODD_BUT_ALLOWED,
]

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n"
KIND = b"Content-Type: application/json\r\n"
RAW = [
    b"",
    b"\r\n\r\n",
    b"\x00" * 1000,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n",
    b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    HEAD + KIND + b"Content-Length: -1\r\n\r\n{}",
    HEAD + KIND + b"Content-Length: 99999999999999999999\r\n\r\n{}",
    HEAD + KIND + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    HEAD + KIND + b"Content-Length: 100\r\n\r\n{",
    HEAD + KIND + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    HEAD + KIND + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n1\r\n{\r\n",
    HEAD + KIND + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    HEAD + KIND + b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n",
    HEAD + b"Content-Type: multipart/form-data\r\nContent-Length: 2\r\n\r\n{}",
    HEAD + b"Content-Type: \xff\xfe\r\nContent-Length: 2\r\n\r\n{}",
    HEAD.replace(b"Bearer %s", b"Bearer " + b"a" * 50_000) + b"\r\n",
    HEAD.replace(b"Bearer %s", b"Basic YTpi") + b"\r\n",
    HEAD.replace(b"Bearer %s", b"\xff\xfe") + b"\r\n",
]
