"""Rendering the chat template of a model once in a process that can be killed.

A template is a program: loops inside loops may never end, and doubling a text may take all memory.
The process renders short conversations with the filters and the sandbox of the transformers
library, and tells which variables the template reads. What it raises does not matter here: the
first prompt raises the same.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from textpolicy.errors import ModelError
from textpolicy.untrusted.bounds import MAX_TEMPLATE_MEMORY, MAX_TEMPLATE_SECONDS
from textpolicy.untrusted.parsing import parse_json

_TEXT_TOO_LONG = 3
_PROGRAM = """
import json, resource, sys
from datetime import datetime
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
try:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
except (ValueError, OSError):
    pass

class Generation(Extension):
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

def refuse(message):
    raise jinja2.TemplateError(message)

environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
environment.globals.update(
    raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
user, answer = ({"role": role, "content": "a b"} for role in ("user", "assistant"))
asked = [[user], [{"role": "system", "content": "s" * 99}, user], [user, answer] * 4 + [user],
         [user, answer], [user | {"content": "x\\n" * 2000}]]
given = json.loads(sys.stdin.buffer.read())
source = given["template"].encode(errors="replace").decode()
try:
    names = jinja2.meta.find_undeclared_variables(environment.parse(source))
    template = environment.from_string(source)
except MemoryError:
    sys.exit(3)
except Exception:
    sys.exit(0)
switches = [{}] + [{name: way} for name in given["switches"] if name in names
                   for way in (True, False)]
for switch in switches:
    for messages in asked:
        for prompt in (True, False):
            try:
                text = template.render({
                    "messages": messages, "add_generation_prompt": prompt, "tools": None,
                    "documents": None, "bos_token": "<s>", "eos_token": "</s>",
                    **json.loads(given["arguments"]), **switch})
            except MemoryError:
                sys.exit(3)
            except Exception:
                continue
            if len(text) > 2 ** 24:
                sys.exit(3)
print(json.dumps(sorted(names)))
"""
SWITCHES = ("enable_thinking", "thinking")
"""The variables of templates that are true or false and switch thinking on or off."""


def check_template_ends(template: Any) -> None:
    """Raise `ModelError` if a chat template, or one of several by name, never ends."""
    templates = template.values() if isinstance(template, dict) else [template]
    for one in templates:
        if isinstance(one, str):
            template_variables(one)


def template_variables(template: str, arguments: Mapping[str, Any] | None = None) -> frozenset[str]:
    """Return the names of the variables that a chat template reads, functions included.

    Raise `ModelError` if the template never ends with these arguments, whose values JSON can hold.
    """
    return _inspect(template, json.dumps(dict(arguments or {}), sort_keys=True))


@cache
def _inspect(template: str, arguments: str) -> frozenset[str]:
    given = {"template": template, "arguments": arguments, "switches": SWITCHES}
    command = [sys.executable, "-I", "-c", _PROGRAM]
    try:
        ended = subprocess.run(
            [*command, str(MAX_TEMPLATE_SECONDS), str(MAX_TEMPLATE_MEMORY)],
            input=json.dumps(given).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Time of the clock, for templates that wait; a busy machine needs some patience.
            timeout=15 * MAX_TEMPLATE_SECONDS,
        )
        code, printed = ended.returncode, ended.stdout
    except subprocess.TimeoutExpired:
        code, printed = _TEXT_TOO_LONG, b""
    if code:
        raise ModelError(
            "the model's chat template does not come to an end: it took more than "
            f"{MAX_TEMPLATE_SECONDS} s of a processor or too much memory for a short conversation. "
            "Use the template of the original model"
        )
    return frozenset(parse_json(printed)) if printed else frozenset()
