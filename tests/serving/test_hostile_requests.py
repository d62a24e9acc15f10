"""After two hundred broken and hostile requests the server answers as before."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serving.conftest import TOKEN
from tests.serving.hostile_requests import ASKED, POSTED, RAW


def test_there_are_two_hundred_different_requests():
    assert len({(one.path, one.body) for one in POSTED}) + len({*RAW}) >= 200


@pytest.mark.slow
@pytest.mark.proves("S13")
def test_hostile_requests_are_refused_and_the_server_goes_on(live, policy_of, attempts):
    ((expected,),) = policy_of(max_tokens=12).generate([ASKED], seed=3)
    host, port = live.address.removeprefix("http://").split(":")
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}

    def post():
        with (
            httpx.Client(base_url=live.address, headers=headers, timeout=60) as client,
            ThreadPoolExecutor(8) as threads,
        ):
            return list(
                threads.map(lambda one: client.post(one.path or "/", content=one.body), POSTED)
            )

    def send_raw(data):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            try:
                connection.sendall(data.replace(b"%s", TOKEN.encode()))
                connection.shutdown(socket.SHUT_WR)
                return connection.recv(200)
            except ConnectionError:
                return b""

    def raw():
        with ThreadPoolExecutor(8) as threads:
            return list(threads.map(send_raw, RAW))

    def ask():
        return live.client().chat.completions.create(
            model="tiny", messages=ASKED, seed=3, max_tokens=12
        )

    (answers,) = live.run(post)
    for request, answer in zip(POSTED, answers, strict=True):
        shown = (request.path, request.body[:200], answer.status_code, answer.text[:300])
        assert answer.status_code < 500, shown
        if request.refused:
            assert answer.status_code >= 400, shown
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, shown
        else:
            assert answer.status_code == 200, shown
            assert json.loads(answer.text)["choices"], shown
    (replies,) = live.run(raw)
    statuses = [reply.split(b" ")[1] for reply in replies if reply]
    # One of them asks whether it may send its body.
    assert statuses and all(s[:1] == b"4" or s == b"100" for s in statuses), statuses
    (answer,) = live.run(ask)
    assert answer.choices[0].message.content == expected.text
    assert live.served.open_rows == 0
    assert live.served.counts.failed_steps == 0
    attempts(len(POSTED) + len(RAW))
