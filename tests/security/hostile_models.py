"""Generators of model folders that nobody should trust: configs, tokenizers, weights, templates."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from textpolicy.generation.model_files import tiny_model

# What may stand in the place of a number, a text or a list of a config.
ODD_VALUES: Mapping[str, Any] = {
    "none": None,
    "true": True,
    "zero": 0,
    "minus one": -1,
    "huge": 10**18,
    "beyond 64 bits": 10**30,
    "half": 0.5,
    "text": "64",
    "list": [64],
    "table": {"a": 1},
    "empty list": [],
    "prime": 13,
}
_CODE = "import os\nopen(os.environ['CANARY'], 'w').close()\n"
_DEEP = '{"a":' * 3000 + "1" + "}" * 3000
DEEP_LIST = "[" * 100_000


def copy_of_tiny(folder: Path) -> Path:
    """Copy the embedded model to a folder. The weights are a link: nothing writes to them."""
    folder.mkdir()
    for path in tiny_model().iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        else:
            shutil.copyfile(path, folder / path.name)
    return folder


def config_with(name: str, value: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {name: value}))

    return write


def config_without(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        del config[name]
        (folder / "config.json").write_text(json.dumps(config))

    return write


def file_with(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def in_place_of(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return write


def tokenizer_with(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        data = json.loads((folder / "tokenizer.json").read_text())
        change(data)
        (folder / "tokenizer.json").write_text(json.dumps(data))

    return write


def hostile_folders() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Yield a name and a function that spoils a copy of the embedded model."""
    config = json.loads((tiny_model() / "config.json").read_text())
    for name in config:
        yield f"config without {name}", config_without(name)
        for kind, value in ODD_VALUES.items():
            yield f"config: {name} is {kind}", config_with(name, value)
    texts = {
        "empty": "",
        "nothing but a brace": "{",
        "null": "null",
        "a list": "[1, 2]",
        "a number": "3",
        "deep": _DEEP,
        "deeper": DEEP_LIST,
        "NaN": '{"model_type": NaN}',
        "two keys": '{"model_type": "qwen3", "model_type": "llama"}',
        "latin-1": '{"model_type": "é"}'.encode("latin-1"),
        "zeros": bytes(1000),
        "a digit after another": '{"hidden_size": ' + "9" * 10_000 + "}",
    }
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name in names:
        for kind, text in texts.items():
            yield f"{name}: {kind}", file_with(name, text)
        yield f"{name}: a pipe", in_place_of(name, os.mkfifo)
        yield f"{name}: a folder", in_place_of(name, os.mkdir)
        yield f"{name}: a link to itself", in_place_of(name, lambda path: path.symlink_to(path))
        yield f"{name}: a device", in_place_of(name, lambda path: path.symlink_to("/dev/zero"))
    weights = next(path.name for path in tiny_model().glob("*.safetensors"))
    for kind, text in texts.items():
        yield f"weights: {kind}", file_with(weights, text)
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    yield "weights: cut off", file_with(weights, len(header).to_bytes(8, "little") + header)
    yield "weights: a huge header", file_with(weights, (2**62).to_bytes(8, "little") + header)
    yield "weights: a pipe", in_place_of(weights, os.mkfifo)
    yield "weights: none", in_place_of(weights, lambda path: None)
    yield from (
        (f"code: {name}", change)
        for name, change in {
            "model_file": config_with("model_file", "evil.py"),
            "auto_map": config_with("auto_map", {"AutoModel": "evil.Model"}),
            "a tokenizer class": file_with(
                "tokenizer_config.json",
                '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", null]}}',
            ),
            "a model type that is a path": config_with("model_type", "../../evil"),
            "a model type that is a module": config_with("model_type", "evil"),
            "a model type with dots": config_with("model_type", "os.path"),
            "a quantization": config_with("quantization", {"group_size": 0, "bits": -3}),
            "a quantization of text": config_with("quantization", "all"),
            "rope": config_with("rope_scaling", {"type": "linear", "factor": "x"}),
            "eos": config_with("eos_token_id", [[1], "x"]),
        }.items()
    )
    for name, change in {
        "no model": lambda data: data.pop("model"),
        "an unknown model": lambda data: data["model"].update(type="Evil"),
        "a vocabulary of lists": lambda data: data["model"].update(vocab=[[1], [2]]),
        "merges of unknown tokens": lambda data: data["model"].update(merges=[["q", "zz"]]),
        "negative ids": lambda data: data["model"]["vocab"].update(a=-5),
        "huge ids": lambda data: data["model"]["vocab"].update(a=2**40),
        "equal ids": lambda data: data["model"].update(vocab=dict.fromkeys("abc", 1)),
        "a regular expression that does not compile": lambda data: data.update(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(("},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        "special tokens beyond the model": lambda data: data["added_tokens"][0].update(id=10**6),
        "no special tokens": lambda data: data.update(added_tokens=[]),
        "an added token without content": lambda data: data["added_tokens"][0].update(content=""),
        "a wrong version": lambda data: data.update(version="99"),
    }.items():
        yield f"tokenizer: {name}", tokenizer_with(change)


def hostile_templates() -> Iterator[tuple[str, str]]:
    """Yield a name and a chat template."""
    wrong = [
        *("{%", "{{", "{% for %}", "{% if %}", "{% endfor %}", "{{ messages", "{% nothing %}"),
        *("{{ 1 / 0 }}", "{{ messages[99].content }}", "{{ messages.x.y }}", "{{ undefined() }}"),
        *("{{ messages | nofilter }}", "{{ messages is notest }}", "{{ messages + 1 }}"),
        *("{{ 'a' + 1 }}", "{{ messages[0] + messages[1] }}", "{{ -messages }}", "{{ [] [0] }}"),
        *("{{ {}['a'].b }}", "{{ (1).real.real.x() }}", "{{ range('a') }}", "{{ dict(1) }}"),
        *("{{ raise_exception('no') }}", "{{ raise_exception(messages) }}", "{% include 'x' %}"),
        *("{% extends 'base' %}", "{% import 'os' as os %}", "{% from 'os' import path %}"),
        *("{{ '%d' % 'a' }}", "{{ '{0.x}'.format(1) }}", "{{ 'a' | int('b') / 0 }}"),
        *("{{ messages | tojson(indent='x') }}", "{{ messages | join(1) | first | first }}"),
        *("{{ messages | sort(attribute='x') }}", "{{ messages | map('x') | list }}"),
        *("{{ 1 | batch(0) | list }}", "{{ strftime_now(1) }}", "{{ '\\ud800' }}"),
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% set ns = namespace(x=1) %}{{ ns.y.z }}",
        *("{% break %}", "{% continue %}", "{% raw %}", "{# never closed", "{% set %}"),
        "{{" + "(" * 500 + "1" + ")" * 500 + "}}",
        "{% if a %}" * 300 + "{% endif %}" * 300,
        "{{ " + "+".join(["1"] * 5000) + " }}",
    ]
    code = [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch $CANARY') }}",
        "{{ lipsum.__globals__['os'].popen('touch $CANARY').read() }}",
        "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch $CANARY') }}",
        "{{ messages.append({}) }}",
        "{{ messages.__class__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ joiner.__init__.__globals__.os }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ (messages | attr('__class__')).mro() }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{% set x = messages.clear() %}",
        "{{ dict.__base__.__subclasses__() }}",
        "{{ range.__self__ }}",
        "{{ request.application }}",
        "{{ config.items() }}",
        "{{ get_flashed_messages.__globals__ }}",
        "{{ url_for.__globals__ }}",
    ]
    endless = [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}"
        "{% endfor %}{{ ns.x }}",
        "{{ 'a' * 10**10 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ [0] * 10**10 }}",
        "{{ '%099999999999d' % 1 }}",
        "{{ 'a' | center(10**11) }}",
        "{% macro m(n) %}{% for i in range(20) %}{{ m(n - 1) if n }}{% endfor %}{% endmacro %}"
        "{{ m(30) }}",
    ]
    for group, templates in {"wrong": wrong, "code": code, "endless": endless}.items():
        for number, template in enumerate(templates):
            yield f"{group} {number}: {template[:60]}", template
