"""The engine's queue has bounds, survives faults, and lets nobody wait for others."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import openai
import pytest

from tests.serving.conftest import serving
from textpolicy.serving.engine_queue import ServedEngine

ASKED = [{"role": "user", "content": "12+34="}]
LONG = {"messages": ASKED, "max_tokens": 400, "temperature": 5.0}


@pytest.fixture(scope="module")
def loaded(load_tiny):
    return load_tiny()


def engine(loaded, **options):
    served = ServedEngine(*loaded, **options)
    served.put("tiny", loaded[0], version=0)
    return served


def chat(live, **options):
    return live.client().chat.completions.create(model="tiny", **options)


def test_a_full_queue_refuses_with_a_time_to_come_again(loaded):
    with serving(engine(loaded, max_open_rows=4)) as live:

        def ask():
            with ThreadPoolExecutor(1) as threads:
                first = threads.submit(chat, live, **LONG, n=4)
                while not live.served.open_rows:
                    time.sleep(0.005)
                with pytest.raises(openai.RateLimitError) as full:
                    chat(live, messages=ASKED)
                with pytest.raises(openai.BadRequestError) as never:
                    chat(live, messages=ASKED, n=5)
                return full.value, never.value, first.result()

        ((full, never, first),) = live.run(ask)
    assert full.response.headers["retry-after"] == "1" and full.code == "queue_full"
    assert never.param == "n" and len(first.choices) == 4


def test_requests_wait_for_memory_and_those_that_never_fit_are_refused(loaded):
    # The embedded model's cache takes a KiB for each token, so two rows of 100 tokens fit.
    with serving(engine(loaded, max_cache_bytes=200 << 10)) as live:

        def ask():
            with pytest.raises(openai.BadRequestError) as large:
                chat(live, messages=ASKED, n=8, max_tokens=80)
            with ThreadPoolExecutor(8) as threads:
                asked = range(8)
                answers = threads.map(
                    lambda seed: chat(live, messages=ASKED, max_tokens=80, seed=seed), asked
                )
                return large.value, list(answers)

        ((large, answers),) = live.run(ask)
    assert large.code == "too_large" and len(answers) == 8


class FaultyModel(nn.Module):
    """A model that fails at prompts with a token that it cannot bear."""

    def __init__(self, inner, unbearable):
        super().__init__()
        self.inner, self._unbearable = inner, unbearable

    @property
    def args(self):
        return self.inner.args

    @property
    def layers(self):
        return self.inner.layers

    def __call__(self, inputs, cache=None):
        if inputs.shape[1] > 1 and mx.any(inputs == self._unbearable):
            raise RuntimeError("out of memory")
        return self.inner(inputs, cache=cache)


def test_a_step_that_fails_fails_its_requests_and_no_others(loaded):
    inner, tokenizer = loaded
    (unbearable,) = tokenizer.encode("Z", add_special_tokens=False)
    served = ServedEngine(inner, tokenizer)
    served.put("tiny", inner, version=0)
    served.put("faulty", FaultyModel(inner, unbearable), version=0)
    with serving(served) as live:

        def ask():
            def create(model, text):
                asked = [{"role": "user", "content": text}]
                return live.client().chat.completions.create(
                    model=model, messages=asked, max_tokens=30, seed=1
                )

            with ThreadPoolExecutor(2) as threads:
                beside = threads.submit(create, "tiny", "Z")
                with pytest.raises(openai.InternalServerError) as failed:
                    create("faulty", "Z")
                return failed.value, beside.result(), create("faulty", "1+1=")

        ((failed, beside, after),) = live.run(ask)
    assert "out of memory" in failed.message
    assert beside.usage.completion_tokens > 0 and after.usage.completion_tokens > 0


def test_a_client_that_does_not_read_delays_nobody(loaded):
    with serving(engine(loaded)) as live:

        def ask():
            host, port = live.address.removeprefix("http://").split(":")
            body = (
                b'{"model": "tiny", "prompt": [7], "n": 32, "max_tokens": 900, "stream": true, '
                b'"temperature": 5, "logprobs": 20}'
            )
            with socket.create_connection((host, int(port))) as slow:
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: "
                kind = "\r\nContent-Type: application/json\r\n\r\n"
                slow.sendall(f"{head}{len(body)}{kind}".encode() + body)
                slow.recv(100)
                return [chat(live, messages=ASKED, max_tokens=4) for _ in range(3)]

        (answers,) = live.run(ask)
    assert all(answer.usage.completion_tokens for answer in answers)


def test_open_requests_are_told_that_the_server_stops(loaded):
    results = []
    with serving(engine(loaded)) as live, ThreadPoolExecutor(2) as threads:

        def ask(**options):
            try:
                results.append(list(chat(live, **LONG, n=8, **options)))
            except openai.APIError as error:
                results.append(error)

        waiting = threads.submit(ask)
        streaming = threads.submit(ask, stream=True)
        live.wait_until(lambda: live.served.counts.steps > 20)
        live.served.close()
        waiting.result()
        streaming.result()
    assert sorted(type(error).__name__ for error in results) == ["APIError", "InternalServerError"]
    assert all(error.code == "server_stopping" for error in results)
