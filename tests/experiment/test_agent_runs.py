"""Runs whose environment is an agent: trained, resumed, evaluated and measured by commands."""

import gc
import json
import os
from pathlib import Path

import pytest

from textpolicy.cli import main
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_metrics

AGENT = """
import http.client, json
from urllib.parse import urlsplit

MAX_TOKENS = 3

def make(rng):
    return f"{rng.randint(10, 99)}+1=", {}

def play(prompt, base_url, api_key):
    parts, texts = urlsplit(base_url), []
    for words in (prompt, prompt + "?"):
        connection = http.client.HTTPConnection(parts.hostname, parts.port)
        body = {"model": "m", "messages": [{"role": "user", "content": words}]}
        headers = {"Authorization": "Bearer " + api_key, "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = json.loads(connection.getresponse().read())
        texts.append(answer["choices"][0]["message"]["content"])
    return float(len("".join(texts)) % 3)
"""
SMALL = ["--groups-per-step", "2", "--group-size", "2", "--rank", "2", "--count", "2"]
LIMITS = ["--agent-processes", "2", "--env-timeout", "60"]


@pytest.fixture
def spec(tmp_path, monkeypatch) -> str:
    (tmp_path / "my_agent.py").write_text(AGENT)
    monkeypatch.chdir(tmp_path)
    return "agent:my_agent.py"


def processes_below(pid: int) -> set[str]:
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


@pytest.mark.slow
def test_train_resumes_an_agent_to_the_same_numbers_and_leaves_no_process(spec, tmp_path):
    before = processes_below(os.getpid())
    train = ["train", "--env", spec, *SMALL, *LIMITS]
    assert main([*train, "--steps", "2", "--output", "whole"]) == 0
    assert main([*train, "--steps", "1", "--output", "cut"]) == 0
    assert main(["train", "--resume", "cut", "--steps", "2"]) == 0
    assert processes_below(os.getpid()) <= before
    whole, cut = (read_metrics(RunDirectory(tmp_path / name).metrics) for name in ("whole", "cut"))
    steps = ([row for row in rows if "loss" in row] for rows in (whole, cut))
    for one, other in zip(*steps, strict=True):
        assert one["rollout/segments"] == other["rollout/segments"] == 2
        for name in ("reward", "loss", "grad_norm", "completions/mean_length"):
            assert one[name] == pytest.approx(other[name], abs=1e-5), name
    rows = RunDirectory(tmp_path / "whole").samples.read_text().splitlines()
    assert {json.loads(row)["segments"] for row in rows} == {2}
    assert {len(json.loads(row)["turns"]) for row in rows} == {2}
    config = (tmp_path / "whole" / "config.toml").read_text()
    assert f"agent:{tmp_path / 'my_agent.py'}" in config
    (tmp_path / "my_agent.py").write_text(AGENT + "\n# changed\n")
    assert main(["train", "--resume", "whole", "--steps", "3"]) != 0


@pytest.mark.slow
def test_eval_and_bench_play_an_agent(spec, capsys):
    assert main(["eval", "--env", spec, "--count", "2", *LIMITS, "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["base"]["reward"] <= 2
    few = ["--groups-per-step", "1", "--group-size", "2", "--seconds", "0.001"]
    # What earlier tests have left would be freed during the measurement, and lower its peak.
    gc.collect()
    assert main(["bench", "--env", spec, *few, *LIMITS, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["metrics"]["rollout/segments"] == data["segments"] == data["agents"] == 2
    planned, peaks = data["planned_bytes"], data["peak_bytes"]
    assert planned["training"] == pytest.approx(peaks["training"], rel=0.25)
    # Answers of agents that ask one after the other do not decode together, and take less.
    assert 0.8 * peaks["sampling"] <= planned["sampling"]


def test_what_an_agent_would_not_read_is_refused(spec, capsys):
    assert main(["train", "--env", spec, "--system", "Be brief.", "--steps", "1"]) != 0
    assert "writes its conversations itself" in capsys.readouterr().err
    assert main(["envs", spec, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_tokens"] == 3
    assert main(["train", "--env", spec, *SMALL, "--dry-run"]) == 0
    assert "memory is that of one answer a rollout" in capsys.readouterr().out
