"""`textpolicy serve` serves what it is told, prints lines that work, and ends by Ctrl-C."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.served_adapters import write_adapters
from tests.serving.command import serve_while
from tests.thinking_models import write_thinking_model
from textpolicy.cli import main

ASKED = [{"role": "user", "content": "12+34="}]
KEY = "a-key-of-the-test"


@pytest.fixture(scope="module")
def adapter_files(load_tiny, tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("served"), load_tiny)


def run_line(line: str, folder: Path) -> str:
    """Return what a printed line prints; `python` is the interpreter of the tests."""
    words = shlex.split(line)
    if words[0] == "python":
        words[0] = sys.executable
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_lines_that_it_prints_work_as_printed(capsys, tmp_path, adapter_files):
    def ask(client):
        out, err = capsys.readouterr()
        curl, python = [line for line in out.splitlines() if line.startswith(("curl", "python"))]
        shown = run_line(curl, tmp_path) if shutil.which("curl") else None
        return out, err, shown, run_line(python, tmp_path)

    argv = ["serve", "--adapter", f"red={adapter_files['red']}", "--max-tokens", "4"]
    code, (out, err, shown, text) = serve_while(argv, ask)
    assert code == 130
    token = re.search(r"^token: (\S{30,})$", out, re.MULTILINE)
    assert token and re.search(r"^address: http://127\.0\.0\.1:\d+$", out, re.MULTILINE)
    assert "models: tiny (version 0), red (version 1)\n" in out
    assert re.search(r"\nloaded the adapters red in \d+\.\d s\n", err)
    assert shown is None or json.loads(shown)["usage"]["completion_tokens"] > 0
    assert text.endswith("\n")


AWKWARD = 'it\'s "größer" 🙂\u202e \\n:\n$HOME `ls` 日本'


@pytest.fixture
def run_of(tmp_path, monkeypatch, adapter_files):
    """Return a function that writes the run `runs/two` with these rows in one of its files."""
    monkeypatch.chdir(tmp_path)

    def write(file: str, prompts: list[Any], config: str = "") -> None:
        from textpolicy.runs import RunDirectory

        run = RunDirectory(Path("runs/two"))
        run.claim()
        run.write_config(config)
        run.adapters.mkdir()
        shutil.copy(adapter_files["red"], run.latest)
        rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
        (run.path / file).write_text("".join(rows), encoding="utf-8")

    return write


def printed_requests(out: str) -> tuple[dict[str, Any], list[Any]]:
    """Return the body of the printed curl line, and the messages of the printed Python line."""
    curl, python = [line for line in out.splitlines() if line.startswith(("curl", "python"))]
    program = ast.parse(shlex.split(python)[-1])
    keywords = [node for node in ast.walk(program) if isinstance(node, ast.keyword)]
    (messages,) = [ast.literal_eval(one.value) for one in keywords if one.arg == "messages"]
    return json.loads(shlex.split(curl)[-1]), messages


@pytest.mark.parametrize("file", ["samples.jsonl", "validation.jsonl"])
def test_the_printed_lines_ask_what_the_run_was_asked(capsys, run_of, file):
    run_of(file, [AWKWARD, "sort 31"], '[task]\nsystem = "Don\'t talk."\n')

    def ask(client):
        body, messages = printed_requests(capsys.readouterr().out)
        sent = client.chat.completions.create(**body, max_tokens=2)
        return [model.id for model in client.models.list()], body, messages, sent

    argv = ["serve", "--no-token", "--adapter", "runs/two"]
    code, (models, body, messages, sent) = serve_while(argv, ask)
    assert code == 130 and models == ["tiny", "two"] and body["model"] == sent.model == "two"
    assert (
        body["messages"]
        == messages
        == [
            {"role": "system", "content": "Don't talk."},
            {"role": "user", "content": AWKWARD},
        ]
    )


def test_a_long_first_prompt_gives_way_to_the_shortest_of_the_next(capsys, run_of):
    asked = [{"role": "user", "content": "sort 31"}]
    run_of("samples.jsonl", ["long " * 100, "sort 3120", asked, *(f"sort {n}" for n in range(99))])
    argv = ["serve", "--no-token", "--adapter", "runs/two"]
    _, out = serve_while(argv, lambda client: capsys.readouterr().out)
    assert printed_requests(out)[0]["messages"] == [{"role": "user", "content": "sort 0"}]


def test_a_model_without_a_run_is_greeted(capsys, adapter_files):
    argv = ["serve", "--no-token", "--adapter", str(adapter_files["red"])]
    _, out = serve_while(argv, lambda client: capsys.readouterr().out)
    assert printed_requests(out)[0] == {
        "model": "red",
        "messages": [{"role": "user", "content": "Hello"}],
    }


def test_a_run_has_the_same_name_from_wherever_it_is_named(run_of, monkeypatch):
    from textpolicy.runs import read_named_adapter

    run_of("samples.jsonl", [])
    named = [read_named_adapter(text).name for text in ("runs/two", "runs/two/", "./runs/two")]
    named += [read_named_adapter("runs/two/adapters/latest.safetensors").name]
    monkeypatch.chdir("runs")
    assert [*named, read_named_adapter("two").name] == ["two", "two", "two", "two/latest", "two"]


def test_a_run_without_its_option_is_an_error_that_names_the_option(capsys, run_of):
    run_of("samples.jsonl", [])
    with pytest.raises(SystemExit):
        main(["serve", "runs/two"])
    assert "every option has a name, such as --adapter runs/two." in capsys.readouterr().err


def test_a_token_of_the_environment_is_not_printed(capsys, monkeypatch):
    monkeypatch.setenv("TEXTPOLICY_TOKEN", KEY)
    code, models = serve_while(["serve"], lambda client: list(client.models.list()), key=KEY)
    out, err = capsys.readouterr()
    assert re.match(r"loading the model tiny\nloaded the model tiny in \d+\.\d s\n", err)
    assert code == 130 and len(models) == 1
    assert KEY not in out and "token: $TEXTPOLICY_TOKEN\n" in out


def test_the_limits_and_names_are_those_of_the_options(capsys, tmp_path, adapter_files):
    elsewhere = tmp_path / "more"
    elsewhere.mkdir()
    shutil.copy(adapter_files["blue"], elsewhere / "b.safetensors")

    def ask(client):
        headers = {"Authorization": f"Bearer {KEY}", "Host": "my-machine"}
        address = str(client.base_url).removesuffix("/v1/")
        load = {"lora_name": "more", "lora_path": str(elsewhere / "b.safetensors")}
        by_name = httpx.post(f"{address}/v1/load_lora_adapter", headers=headers, json=load)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="more", messages=ASKED, max_tokens=60)
        answer = client.chat.completions.create(
            model="more", messages=[{"role": "user", "content": "<|im_end|>"}], temperature=5
        )
        return by_name, answer.usage, [model.max_model_len for model in client.models.list()]

    argv = [
        *("serve", "--model", "tiny", "--dtype", "float32", "--threads", "1", "--token", KEY),
        *("--host", "127.0.0.1", "--allow-host", "my-machine", "--allow-load", str(elsewhere)),
        *("--max-model-len", "32", "--max-tokens", "3", "--max-rows", "2"),
        *("--allow-special-tokens", "--json"),
    ]
    code, (loaded, usage, lengths) = serve_while(argv, ask, key=KEY)
    start, end = map(json.loads, capsys.readouterr().out.splitlines())
    assert (code, loaded.status_code, lengths) == (130, 200, [32, 32])
    # The text spells a control token, and is one token: without the option it would be several.
    assert usage.prompt_tokens == 9 and usage.completion_tokens <= 3
    assert start["token"] == KEY and start["models"] == {"tiny": 0}
    assert end["sampled_tokens"] == usage.completion_tokens


def test_thinking_is_switched_by_the_command_and_by_a_request(tmp_path):
    model = str(write_thinking_model(tmp_path / "model", "qwen3_5"))

    def prompts(client):
        ways = ({}, {"enable_thinking": True}, {"enable_thinking": False})
        return [
            client.chat.completions.create(
                model="model",
                messages=ASKED,
                max_tokens=1,
                extra_body={"return_token_ids": True, "chat_template_kwargs": given},
            ).prompt_token_ids
            for given in ways
        ]

    argv = ["serve", "--no-token", "--model", model]
    _, (off, on, also_off) = serve_while([*argv, "--thinking", "off"], prompts)
    _, (also_on, _, _) = serve_while([*argv, "--template-args", "enable_thinking=true"], prompts)
    assert off == also_off and on == also_on and off != on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0", "--no-token"], "--no-token lets everybody ask"),
        (["--token", "abc"], "the token has 3 characters"),
        (["--token", KEY, "--no-token"], "exclude each other"),
        (["--adapter", "no/such"], "there is no run and no adapter at no/such"),
        (["--follow", "no/such"], "--follow names no/such"),
        (["--port", "99999"], "from 0 to 65535"),
        (["--model", "no/such"], "no/such"),
    ],
)
def test_a_wrong_option_is_an_error_before_anything_is_served(failure, options, message):
    if "99999" in options:
        with pytest.raises(SystemExit) as ended:
            main(["serve", *options])
        assert ended.value.code == 2
        return
    assert message in failure("serve", *options, code=2)


def test_without_the_extra_the_command_says_what_to_install(failure, monkeypatch):
    # With None in sys.modules, Python finds no such package.
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'textpolicy[serve]'" in failure("serve", code=2)
