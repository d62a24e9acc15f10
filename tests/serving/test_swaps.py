"""Adapters are loaded, swapped and unloaded while others ask, and no request is lost."""

import gc
import shutil
import subprocess
import sys
import time
import weakref
from contextlib import ExitStack
from dataclasses import replace

import httpx
import pytest

from tests.serving.command import free_of, serve_while
from tests.serving.conftest import TOKEN, serving
from textpolicy.adapters import read_adapter
from textpolicy.serving.adapters import ServedAdapters
from textpolicy.serving.engine_queue import ServedEngine
from textpolicy.serving.follow import Followers

ASKED = [{"role": "user", "content": "12+34="}]
COLOURS = ("red", "blue")
SECONDS = 2.0


@pytest.fixture(scope="module")
def served(load_tiny):
    return ServedEngine(*load_tiny())


@pytest.fixture(scope="module")
def adapters(served, adapter_files):
    return ServedAdapters(served, "tiny", allowed=[adapter_files["red"].parent])


def version_of(answer):
    return int(answer.system_fingerprint.partition("@")[2])


def test_swaps_under_load_fail_no_request_and_every_version_answers_as_itself(
    served, adapters, adapter_files, policy_of
):
    sources = [read_adapter(adapter_files[colour]) for colour in COLOURS]
    expected = [
        [policy_of(colour, max_tokens=8).generate([ASKED], seed=seed)[0][0].text for seed in (1, 2)]
        for colour in COLOURS
    ]
    versions = [0]
    adapters.put_adapter("policy", replace(sources[0], version=0))
    deadline = time.monotonic() + SECONDS
    begun = list(versions)

    def swap():
        while time.monotonic() < deadline:
            version = begun[-1] + 1
            begun.append(version)
            adapter = replace(sources[version % 2], version=version)
            served.call(lambda a=adapter: adapters.put_adapter("policy", a)).result()
            versions.append(version)
            time.sleep(0.02)
        return []

    def ask(live, seed):
        client = live.client()
        answers = []
        while time.monotonic() < deadline:
            newest = versions[-1]
            answer = client.chat.completions.create(
                model="policy", messages=ASKED, seed=seed, max_tokens=8
            )
            answers.append((newest, answer, seed))
        return answers

    with serving(served) as live:
        tasks = [lambda s=seed: ask(live, s) for seed in (1, 2, 1, 2)]
        answers = [one for some in live.run(swap, *tasks) for one in some]
    assert len(versions) > 10 and len(answers) > 10
    for newest, answer, seed in answers:
        version = version_of(answer)
        assert version in begun and version >= newest
        assert answer.choices[0].message.content == expected[version % 2][seed - 1]


def test_an_answer_ends_with_its_version_and_old_versions_are_dropped(
    served_anew, adapter_files, policy_of
):
    served, adapters = served_anew
    red, blue = (read_adapter(adapter_files[colour]) for colour in COLOURS)
    adapters.put_adapter("policy", red)
    old = weakref.ref(served.models["policy"].model)
    options = {"max_tokens": 60, "temperature": 1.3}
    ((expected,),) = policy_of("red", **options).generate([ASKED], seed=5)

    def ask(live):
        client = live.client()
        stream = client.chat.completions.create(
            model="policy", messages=ASKED, seed=5, stream=True, **options
        )
        chunks = [next(stream)]
        served.call(lambda: adapters.put_adapter("policy", blue)).result()
        after = client.chat.completions.create(model="policy", messages=ASKED, max_tokens=1)
        return [*chunks, *stream], after

    with serving(served) as live:
        ((chunks, after),) = live.run(lambda: ask(live))
        assert {version_of(chunk) for chunk in chunks} == {1} and version_of(after) == 2
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == expected.text
        gc.collect()
        assert old() is None


@pytest.fixture
def served_anew(load_tiny, adapter_files):
    served = ServedEngine(*load_tiny())
    return served, ServedAdapters(served, "tiny", allowed=[adapter_files["red"].parent])


def test_clients_load_and_unload_adapters_of_allowed_folders(live, adapter_files, tmp_path):
    elsewhere = tmp_path / "red.safetensors"
    shutil.copy(adapter_files["red"], elsewhere)
    link = adapter_files["red"].parent / "link.safetensors"
    link.symlink_to(elsewhere)
    broken = adapter_files["red"].parent / "broken.safetensors"
    broken.write_bytes(b"no adapter")

    def ask():
        headers = {"Authorization": f"Bearer {TOKEN}"}
        client = clients.enter_context(httpx.Client(base_url=live.address, headers=headers))

        def load(name, path, **more):
            body = {"lora_name": name, "lora_path": str(path), **more}
            return client.post("/v1/load_lora_adapter", json=body).status_code

        def unload(name):
            return client.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code

        def known():
            return {model.id for model in live.client().models.list()}

        found = [load("new", adapter_files["red"]), "new" in known()]
        found += [load("new", adapter_files["blue"])]
        found += [load("new", adapter_files["blue"], load_inplace=True)]
        answer = live.client().chat.completions.create(model="new", messages=ASKED, max_tokens=1)
        found += [version_of(answer), unload("new"), unload("new"), "new" in known()]
        found += [load("x", elsewhere), load("x", link), load("x", broken)]
        found += [load("x", adapter_files["red"].with_name("no")), load("tiny", broken)]
        return [*found, unload("tiny"), known()]

    with ExitStack() as clients:
        (found,) = live.run(ask)
    link.unlink()
    broken.unlink()
    assert found[:8] == [200, True, 400, 200, 2, 200, 404, False]
    assert found[8:] == [403, 403, 400, 404, 400, 400, {"tiny", "red", "blue"}]


def test_a_followed_file_is_served_version_by_version(served_anew, adapter_files, tmp_path):
    served, adapters = served_anew
    path, told = tmp_path / "latest.safetensors", []
    followers = Followers(served, adapters, {"run": path})
    followers.load_present()
    assert "run" not in served.models

    def ask(live):
        found = []
        for colour in COLOURS:
            shutil.copy(adapter_files[colour], path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
            wanted = COLOURS.index(colour) + 1
            assert free_of(10, lambda w=wanted: _version(served) == w)
            answer = live.client().chat.completions.create(
                model="run", messages=ASKED, max_tokens=1
            )
            found.append(version_of(answer))
        path.write_bytes(b"no adapter")
        path.unlink()
        time.sleep(0.3)
        return found

    with serving(served) as live, followers.watching(told.append):
        assert live.run(lambda: ask(live)) == [[1, 2]]
    assert told[:2] == ["run: version 1", "run: version 2"]


def _version(served):
    return served.models["run"].version if "run" in served.models else None


@pytest.mark.slow
def test_the_versions_of_answers_rise_with_a_run_that_trains(tmp_path):
    run = tmp_path / "run"
    train = [
        *(sys.executable, "-m", "textpolicy", "train", "--env", "add", "--steps", "400"),
        *("--group-size", "4", "--groups-per-step", "2", "--max-tokens", "4", "--count", "4"),
        *("--eval-every", "1000", "--threads", "1", "--output", str(run)),
    ]
    training = subprocess.Popen(train, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert free_of(120, (run / "adapters" / "latest.safetensors").exists)

        def ask(client):
            versions = []
            deadline = time.monotonic() + 60
            while len(set(versions)) < 5 and time.monotonic() < deadline:
                answer = client.chat.completions.create(model="run", messages=ASKED, max_tokens=2)
                versions.append(version_of(answer))
                time.sleep(0.1)
            return versions

        code, versions = serve_while(["serve", "--follow", str(run), "--no-token"], ask)
    finally:
        training.kill()
        training.wait()
    assert code == 130
    assert versions == sorted(versions) and len(set(versions)) >= 5
