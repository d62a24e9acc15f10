"""The official client gets what the engine samples, and OpenAI's errors where it is refused."""

import http.client
import json
import math
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.serving.conftest import TOKEN

ASKED = [{"role": "user", "content": "12+34="}]
OTHER = [{"role": "user", "content": "Sort 3 1 2, and say something long"}]

LONG = [{"role": "user", "content": "a" * 3000}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
THINK = {"chat_template_kwargs": {"enable_thinking": True}}
UNSUPPORTED = "unsupported_parameter"


def chat(client, model="tiny", messages=ASKED, **options):
    return client.chat.completions.create(model=model, messages=messages, **options)


def test_a_chat_answer_is_the_answer_of_generate(live, policy_of):
    ((expected,),) = policy_of(max_tokens=24).generate([OTHER], seed=5)
    answer = live.ask(lambda client: chat(client, messages=OTHER, seed=5, max_tokens=24))
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == {"stop_token": "stop", "length": "length"}[expected.stop_reason]
    assert answer.usage.prompt_tokens == len(expected.prompt_tokens)
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.system_fingerprint == "tiny@0"


def test_a_stream_has_the_same_text_and_ends_with_the_usage(live):
    def ask(client):
        whole = chat(client, messages=OTHER, seed=5, max_tokens=24)
        options = {"include_usage": True}
        stream = chat(
            client, messages=OTHER, seed=5, max_tokens=24, stream=True, stream_options=options
        )
        return whole, list(stream)

    whole, chunks = live.ask(ask)
    *shown, last = chunks
    texts = [chunk.choices[0].delta.content or "" for chunk in shown]
    assert "".join(texts) == whole.choices[0].message.content
    assert sum(map(bool, texts)) > 3
    assert [c.choices[0].finish_reason for c in shown][-1] == whole.choices[0].finish_reason
    assert last.choices == [] and last.usage == whole.usage


def test_log_probabilities_are_those_of_the_engine(live, policy_of):
    ((expected,),) = policy_of(max_tokens=12).generate([ASKED], seed=3)
    answer, text = live.ask(
        lambda client: (
            chat(client, seed=3, max_tokens=12, logprobs=True, top_logprobs=3),
            client.completions.create(
                model="tiny", prompt=expected.prompt_tokens, seed=3, max_tokens=12, logprobs=3
            ),
        )
    )
    entries = answer.choices[0].logprobs.content
    # At temperature 1 the model's own distribution is the one that is sampled from.
    assert [one.logprob for one in entries] == pytest.approx(expected.logprobs, abs=1e-5)
    assert text.choices[0].logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert text.choices[0].logprobs.tokens == [one.token for one in entries]
    for one in entries:
        likeliest = [other.logprob for other in one.top_logprobs]
        assert len(likeliest) == 3 and likeliest == sorted(likeliest, reverse=True)
        assert bytes(one.bytes).decode() == one.token
    own = live.exchanges[-2]
    assert own.tokens == expected.tokens
    assert own.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_two_adapters_answer_by_name_as_generate_does_with_each(live, policy_of):
    expected = {
        name: [c.text for c in policy_of(name, max_tokens=16).generate([ASKED], n=2, seed=8)[0]]
        for name in ("tiny", "red", "blue")
    }
    names = list(expected)
    answers = live.run(
        *[lambda name=n: chat(live.client(), name, seed=8, n=2, max_tokens=16) for n in names]
    )
    found = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert dict(zip(names, found, strict=True)) == expected
    assert len({tuple(texts) for texts in found}) == 3
    assert [a.system_fingerprint for a in answers] == ["tiny@0", "red@1", "blue@2"]


def test_a_seed_repeats_all_choices_and_choices_differ(live):
    first, again, other = live.ask(
        lambda client: [chat(client, messages=OTHER, seed=s, n=4) for s in (1, 1, 2)]
    )
    texts = [[c.message.content for c in answer.choices] for answer in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]


def test_prompts_may_be_token_ids_and_batches(live, policy_of):
    policy = policy_of(max_tokens=8)
    prompts = [policy.encode("12+34="), policy.encode("9+9=")]

    def ask(client):
        options = {"model": "tiny", "seed": 4, "max_tokens": 8}
        ids = {"extra_body": {"return_token_ids": True}}
        return (
            client.completions.create(prompt=prompts[0], **options, **ids),
            client.completions.create(prompt=prompts, n=2, **options, **ids),
            client.completions.create(prompt=["1+1=", "2+2="], **options),
        )

    one, batch, texts = live.ask(ask)
    assert one.choices[0].token_ids == batch.choices[0].token_ids
    assert one.choices[0].prompt_token_ids == prompts[0]
    expected = policy.generate(["12+34=", "9+9="], n=2, seed=4)
    assert [c.token_ids for c in batch.choices] == [c.tokens for group in expected for c in group]
    assert len(texts.choices) == 2


def test_stop_strings_end_the_answer_and_are_not_shown(live, policy_of):
    ((expected,),) = policy_of(max_tokens=24).generate([OTHER], seed=5)
    stop = expected.text[4:6]
    whole, chunks = live.ask(
        lambda client: (
            chat(client, messages=OTHER, seed=5, max_tokens=24, stop=[stop]),
            list(chat(client, messages=OTHER, seed=5, max_tokens=24, stop=[stop], stream=True)),
        )
    )
    cut = expected.text[: expected.text.index(stop)]
    assert whole.choices[0].message.content == cut
    assert whole.choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == cut


def test_models_are_listed_with_their_base_and_their_longest_context(live):
    listed = live.ask(lambda client: [model.model_dump() for model in client.models.list()])
    assert {model["id"]: model["parent"] for model in listed} == {
        "tiny": None,
        "red": "tiny",
        "blue": "tiny",
    }
    assert {model["max_model_len"] for model in listed} == {1024}
    assert live.ask(lambda client: client.models.retrieve("red")).model_dump()["version"] == 1


@pytest.mark.parametrize(
    ("options", "status", "param", "code"),
    [
        ({"model": "gpt-7"}, 404, "model", "model_not_found"),
        ({"messages": LONG}, 400, "messages", "context_length_exceeded"),
        ({"max_tokens": 1024}, 400, "messages", "context_length_exceeded"),
        ({"temperature": -1}, 400, "temperature", "invalid_value"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", UNSUPPORTED),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", UNSUPPORTED),
        ({"extra_body": {"temprature": 1}}, 400, "temprature", "unknown_parameter"),
        ({"extra_body": THINK}, 400, "chat_template_kwargs.enable_thinking", UNSUPPORTED),
        ({"tools": TOOLS}, 400, "tools", UNSUPPORTED),
    ],
)
def test_a_request_that_cannot_be_honoured_names_the_parameter(live, options, status, param, code):
    def ask(client):
        with pytest.raises(openai.APIStatusError) as refused:
            chat(client, **options)
        return refused.value

    error = live.ask(ask)
    assert (error.status_code, error.param, error.code) == (status, param, code)
    assert error.body["message"] and error.body["type"]


@pytest.mark.proves("S13")
def test_a_wrong_key_a_wrong_host_and_a_long_body_are_refused(live):
    def ask():
        with pytest.raises(openai.AuthenticationError):
            chat(live.client("another-token"))
        with pytest.raises(openai.APIStatusError) as long:
            chat(live.client(), messages=[{"role": "user", "content": "a" * 10_000_000}])
        headers = {"Authorization": f"Bearer {TOKEN}", "Host": "evil.example"}
        wrong_host = httpx.get(f"{live.address}/v1/models", headers=headers)
        no_key = httpx.get(f"{live.address}/v1/models")
        page = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "text/plain"}
        from_page = httpx.post(f"{live.address}/v1/completions", headers=page, content="{}")
        return long.value.status_code, wrong_host, no_key, from_page

    (results,) = live.run(ask)
    long, *answers = results
    assert long == 413
    assert [answer.status_code for answer in answers] == [403, 401, 415]
    assert all(answer.json()["error"]["message"] for answer in answers)
    assert not any("access-control-allow-origin" in answer.headers for answer in answers)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows(live, stream):
    body = {"model": "tiny", "messages": OTHER, "n": 8, "max_tokens": 900, "stream": stream}
    # A token that cannot be sampled from the text alone ends the answer, so none ends early.
    body |= {"temperature": 5.0}

    def ask():
        host = live.address.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=30)
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        if stream:
            connection.getresponse().read(100)
        else:
            while live.served.open_rows == 0:
                time.sleep(0.01)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        deadline = time.monotonic() + 20
        while live.served.open_rows and time.monotonic() < deadline:
            time.sleep(0.01)
        return live.served.open_rows

    sampled = live.served.counts.sampled_tokens
    assert live.run(ask) == [0]
    assert live.served.counts.sampled_tokens - sampled < 8 * 900


def test_many_clients_at_once_each_get_their_own_answer(live, policy_of):
    policy = policy_of(max_tokens=12)
    expected = [policy.generate([f"{n}+{n}="], seed=n)[0][0].text for n in range(24)]

    def ask():
        with ThreadPoolExecutor(24) as threads:
            client = live.client()
            asked = [[{"role": "user", "content": f"{n}+{n}="}] for n in range(24)]
            return list(
                threads.map(
                    lambda n: chat(client, messages=asked[n], seed=n, max_tokens=12), range(24)
                )
            )

    (answers,) = live.run(ask)
    assert [answer.choices[0].message.content for answer in answers] == expected


def test_generate_answers_as_vllm_does(live, policy_of):
    policy = policy_of("red", max_tokens=6)
    ((expected,),) = policy.generate([ASKED], seed=2)
    body = {
        "model": "red",
        "token_ids": expected.prompt_tokens,
        "sampling_params": {"max_tokens": 6, "seed": 2, "logprobs": 1, "temperature": 1.0}
        # Clients that want token ids alone say how they would want the text.
        | {"skip_special_tokens": False, "detokenize": False, "routed_experts_prompt_start": 0},
    }
    headers = {"Authorization": f"Bearer {TOKEN}"}
    (answer,) = live.run(
        lambda: httpx.post(f"{live.address}/inference/v1/generate", json=body, headers=headers)
    )
    (choice,) = answer.json()["choices"]
    assert choice["token_ids"] == expected.tokens
    entries = choice["logprobs"]["content"]
    assert [one["token"] for one in entries] == [f"token_id:{t}" for t in expected.tokens]
    assert [one["logprob"] for one in entries] == pytest.approx(expected.logprobs, abs=1e-5)
    assert all(math.isfinite(one["logprob"]) for one in entries)
    versions = [{"version": "1", "start": 0, "end": len(expected.tokens)}]
    assert choice["weight_versions"] == versions


def test_every_finished_answer_is_reported_with_its_owner(live, policy_of):
    ((expected,),) = policy_of("blue", max_tokens=16).generate([ASKED], seed=8)
    live.exchanges.clear()
    live.ask(lambda client: chat(client, "blue", seed=8, max_tokens=16))
    (exchange,) = live.exchanges
    assert exchange.owner == "token"
    assert (exchange.model, exchange.version) == ("blue", 2)
    assert exchange.messages == ASKED
    assert exchange.prompt_tokens == expected.prompt_tokens
    assert exchange.tokens == expected.tokens
    assert exchange.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert (exchange.text, exchange.finish_reason) == (expected.text, "length")


def test_a_monitor_reads_health_without_a_key_and_numbers_with_it(live):
    def read():
        headers = {"Authorization": f"Bearer {TOKEN}"}
        before = httpx.get(f"{live.address}/metrics", headers=headers).text
        answer = chat(live.client(), "red", max_tokens=3)
        after = httpx.get(f"{live.address}/metrics", headers=headers).text
        alone = [httpx.get(f"{live.address}{path}") for path in ("/health", "/metrics")]
        return before, after, answer.usage.completion_tokens, alone

    ((before, after, tokens, (health, metrics)),) = live.run(read)

    def number(text, name):
        (line,) = [line for line in text.splitlines() if line.startswith(f"textpolicy_{name} ")]
        return int(line.split()[1])

    assert number(after, "sampled_tokens_total") - number(before, "sampled_tokens_total") == tokens
    assert number(after, "finished_rows_total") - number(before, "finished_rows_total") == 1
    assert 'textpolicy_model_version{model="red"} 1' in after
    assert (health.status_code, health.json(), metrics.status_code) == (200, {"status": "ok"}, 401)
