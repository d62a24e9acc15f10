"""`textpolicy serve`: answer OpenAI's API with a model and adapters, until Ctrl-C."""

import json
import os
import secrets
import shlex
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from signal import Signals
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.activity import doing
from textpolicy.adapters import read_adapter
from textpolicy.adapters.base_quantization import quantize_for_adapter
from textpolicy.cli.answer import Answer
from textpolicy.cli.flags import configured
from textpolicy.cli.models_of_runs import with_model_of_run
from textpolicy.cli.output import print_answer, print_note
from textpolicy.cli.progress import showing_progress
from textpolicy.cli.signals import STOPPING
from textpolicy.config import TrainConfig
from textpolicy.errors import ConfigError
from textpolicy.experiment.assembly import dtype_of, template_arguments_of
from textpolicy.experiment.threads import apply_thread_option
from textpolicy.export.asking import read_asking
from textpolicy.generation.mlx_generation import load_model
from textpolicy.runs import NamedAdapter, RunDirectory, read_named_adapter
from textpolicy.runs.named_adapter import run_of_adapter
from textpolicy.serving.adapters import ServedAdapters
from textpolicy.serving.encoding import PromptEncoder
from textpolicy.serving.engine_queue import ServedEngine
from textpolicy.serving.follow import Followers
from textpolicy.serving.security import hosts_for, is_loopback, one_key
from textpolicy.types import Message, Prompt

TOKEN_VARIABLE = "TEXTPOLICY_TOKEN"
_MIN_TOKEN = 8
_PROMPTS_READ = 8
"""Prompts of a run among which the shortest is shown, if the first one is long."""
_LONG_PROMPT = 200


def run(options: Namespace) -> Answer:
    if any(find_spec(package) is None for package in ("starlette", "uvicorn")):
        raise ConfigError("the server needs two packages: pip install 'textpolicy[serve]'")
    # These import the two packages.
    from textpolicy.serving.app import create_app
    from textpolicy.serving.server import running_server

    key = _key(options)
    with showing_progress(print_note):
        served, adapters, followers, arguments, paths = _load(options)
    app = create_app(
        served,
        owner_of=one_key(key.token) if key else None,
        hosts=hosts_for(options.host, options.allow_host or ()),
        adapters=adapters,
        encoder=PromptEncoder(
            served.model,
            served.tokenizer,
            max_model_len=options.max_model_len,
            max_tokens=options.max_tokens,
            allow_special_tokens=configured(TrainConfig(), options).model.allow_special_tokens,
            chat_template_kwargs=arguments,
            note=print_note,
        ),
    )
    with (
        _until_signal(served.wake) as stopped,
        running_server(app, options.host, options.port) as address,
        followers.watching(print_note),
    ):
        name = list(served.models)[-1]
        asked = _example(paths.get(name), served.tokenizer)
        _print_start(address, key, _versions(served.models), asked, as_json=options.json)
        served.run(until=lambda: stopped.signal is not None)
    assert stopped.signal is not None
    print_note(f"{stopped.signal.name}: the server has stopped")
    return Answer(data=asdict(served.counts), text="", exit_code=128 + stopped.signal)


def _load(
    options: Namespace,
) -> tuple[ServedEngine, ServedAdapters, Followers, dict[str, Any], dict[str, Path]]:
    """Return the engine, its adapters, the followed runs, the arguments of the template, and files.

    The files are those of the adapters by name.
    """
    config = configured(TrainConfig(), options)
    named = [read_named_adapter(text) for text in options.adapter or ()]
    followed = [_followed_run(text) for text in options.follow or ()]
    _check_names([one.name for one in (*named, *followed)])
    config = with_model_of_run(config, options, [one.path for one in (*named, *followed)])
    apply_thread_option(config.model)
    with _telling(f"the model {config.model.name}"):
        model, tokenizer = load_model(config.model.name, dtype=dtype_of(config.model))
    arguments = template_arguments_of(config.model, tokenizer)
    names = [one.name for one in (*named, *followed)]
    with _telling(f"the adapters {', '.join(names)}") if names else nullcontext():
        sources = {one.name: read_adapter(one.path) for one in named}
        present = [read_adapter(one.path) for one in followed if one.path.exists()]
        for adapter in (*sources.values(), *present):
            quantize_for_adapter(model, adapter)
        served = ServedEngine(model, tokenizer, max_rows=options.max_rows)
        allowed = [Path("runs"), *(options.allow_load or ()), *(one.path.parent for one in named)]
        adapters = ServedAdapters(served, _base_name(config.model.name), allowed=allowed)
        for name, adapter in sources.items():
            adapters.put_adapter(name, adapter)
        followers = Followers(served, adapters, {one.name: one.path for one in followed})
        followers.load_present()
    return (
        served,
        adapters,
        followers,
        arguments,
        {one.name: one.path for one in (*named, *followed)},
    )


@contextmanager
def _telling(what: str) -> Generator[None]:
    """Say that a part is being loaded, and how long that took."""
    print_note(f"loading {what}")
    started = time.monotonic()
    with doing(f"loading {what}"):
        yield
    print_note(f"loaded {what} in {time.monotonic() - started:.1f} s")


def _followed_run(text: str) -> NamedAdapter:
    """Return the file in which a run publishes each version, under the name of the run."""
    name, equals, source = text.partition("=")
    if not equals or Path(text).exists():
        name, source = "", text
    run = RunDirectory(Path(source).expanduser())
    if not run.config.is_file():
        raise ConfigError(
            f"--follow names {source}, which is no folder of a run. Start the run first, and name "
            "the folder that it prints, such as runs/add"
        )
    return NamedAdapter(name or run.path.name, run.latest)


def _check_names(names: list[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"several adapters are named {twice[0]!r}. Give each a name of its own: "
            "--adapter NAME=ADAPTER"
        )


def _base_name(model: str) -> str:
    """Return the name of the base model: a folder has the folder's name."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


@dataclass(frozen=True)
class _Key:
    """The token, and how it is shown, sent by a shell, and named in Python."""

    token: str
    shown: str
    header: str
    in_python: str


def _key(options: Namespace) -> _Key | None:
    """Return the token that clients have to send, or None if they need none."""
    if options.no_token:
        if not is_loopback(options.host):
            raise ConfigError(
                f"--no-token lets everybody ask who can reach {options.host}. It is possible only "
                "with --host 127.0.0.1, which this machine alone can reach"
            )
        if options.token:
            raise ConfigError("--token and --no-token exclude each other. Leave out one of them")
        return None
    token = options.token or os.environ.get(TOKEN_VARIABLE)
    if token and (len(token) < _MIN_TOKEN or not token.isascii() or not token.isprintable()):
        raise ConfigError(
            f"the token has {len(token)} characters; expected at least {_MIN_TOKEN}, all of them "
            "printable ASCII. Leave out --token for a random one"
        )
    if token and not options.token:
        # A secret of the environment is not printed.
        shown = f"${TOKEN_VARIABLE}"
        in_python = f'__import__("os").environ["{TOKEN_VARIABLE}"]'
        return _Key(token, shown, f'"Authorization: Bearer {shown}"', in_python)
    token = token or secrets.token_urlsafe(24)
    return _Key(token, token, shlex.quote(f"Authorization: Bearer {token}"), json.dumps(token))


def _versions(models: Mapping[str, Any]) -> dict[str, int]:
    return {name: one.version for name, one in models.items()}


def _example(adapter: Path | None, tokenizer: TokenizerWrapper) -> list[Message]:
    """Return the conversation that the printed lines ask: of the adapter's run, or a greeting."""
    run = run_of_adapter(adapter) if adapter else None
    # Without a run, the prompts are those for the proof of an export.
    prompts = read_asking(run, tokenizer, _PROMPTS_READ).prompts
    prompt = prompts[0] if len(str(prompts[0])) <= _LONG_PROMPT else min(prompts, key=_length)
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]


def _length(prompt: Prompt) -> int:
    return len(str(prompt))


def _print_start(
    address: str,
    key: _Key | None,
    models: dict[str, int],
    asked: list[Message],
    *,
    as_json: bool,
) -> None:
    """Print where the server is, what it serves, and lines that ask it."""
    if as_json:
        token = key.shown if key else None
        print_answer(json.dumps({"address": address, "token": token, "models": models}))
        return
    versions = ", ".join(f"{name} (version {number})" for name, number in models.items())
    name = list(models)[-1]
    print_answer(
        f"address: {address}\ntoken: {key.shown if key else 'none'}\nmodels: {versions}\n\n"
        f"{_curl_line(address, key, name, asked)}\n\n{_python_line(address, key, name, asked)}\n"
    )


def _curl_line(address: str, key: _Key | None, model: str, asked: list[Message]) -> str:
    body = json.dumps({"model": model, "messages": asked})
    secret = f" -H {key.header}" if key else ""
    # Brackets of an IPv6 address mean something to a shell.
    url = shlex.quote(f"{address}/v1/chat/completions")
    return f"curl {url}{secret} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def _python_line(address: str, key: _Key | None, model: str, asked: list[Message]) -> str:
    secret = key.in_python if key else '"-"'
    program = (
        f'from openai import OpenAI; client = OpenAI(base_url="{address}/v1", api_key={secret}); '
        f"print(client.chat.completions.create(model={_literal(model)}, "
        f"messages={_literal(asked)}).choices[0].message.content)"
    )
    return f"python -c {shlex.quote(program)}"


def _literal(value: Any) -> str:
    """Return a text or messages as a Python literal in ASCII.

    The escapes of JSON would split an emoji into two characters.
    """
    return json.dumps(value, ensure_ascii=False).encode("ascii", "backslashreplace").decode()


class _Stop:
    """The signal that ends the server, once it has come."""

    signal: Signals | None = None


@contextmanager
def _until_signal(wake: Callable[[], None]) -> Generator[_Stop]:
    """Inside, the first Ctrl-C or SIGTERM ends the server after the step, the second at once."""
    stop = _Stop()
    wanted = [s for s in STOPPING if signal.getsignal(s) is not signal.SIG_IGN]
    before = {number: signal.getsignal(number) for number in wanted}

    def note(number: int, frame: object) -> None:
        stop.signal = Signals(number)
        signal.signal(number, before[Signals(number)])
        wake()

    for number in wanted:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
