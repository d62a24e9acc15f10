"""Rendering the chat template of a model once in a process that can be killed.

A template is a program: loops inside loops may never end, and doubling a text may take all memory.
The process renders short conversations with the filters and the sandbox of the transformers
library. What it raises does not matter here: the first prompt raises the same.
"""

import subprocess
import sys
from functools import cache
from typing import Any

from textpolicy.errors import ModelError
from textpolicy.untrusted.bounds import MAX_TEMPLATE_MEMORY, MAX_TEMPLATE_SECONDS

_TEXT_TOO_LONG = 3
_PROGRAM = """
import json, resource, sys
from datetime import datetime
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import jinja2
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
try:
    template = environment.from_string(sys.stdin.buffer.read().decode(errors="replace"))
except MemoryError:
    sys.exit(3)
except Exception:
    sys.exit(0)
for messages in asked:
    for prompt in (True, False):
        try:
            text = template.render(
                messages=messages, add_generation_prompt=prompt, tools=None, documents=None,
                bos_token="<s>", eos_token="</s>", enable_thinking=False)
        except MemoryError:
            sys.exit(3)
        except Exception:
            continue
        if len(text) > 2 ** 24:
            sys.exit(3)
"""


def check_template_ends(template: Any) -> None:
    """Raise `ModelError` if a chat template, or one of several by name, never ends."""
    templates = template.values() if isinstance(template, dict) else [template]
    for one in templates:
        if isinstance(one, str):
            _check_one(one)


@cache
def _check_one(template: str) -> None:
    command = [sys.executable, "-I", "-c", _PROGRAM]
    try:
        code = subprocess.run(
            [*command, str(MAX_TEMPLATE_SECONDS), str(MAX_TEMPLATE_MEMORY)],
            input=template.encode(errors="surrogatepass"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Time of the clock, for templates that wait; a busy machine needs some patience.
            timeout=15 * MAX_TEMPLATE_SECONDS,
        ).returncode
    except subprocess.TimeoutExpired:
        code = _TEXT_TOO_LONG
    if code:
        raise ModelError(
            "the model's chat template does not come to an end: it took more than "
            f"{MAX_TEMPLATE_SECONDS} s of a processor or too much memory for a short conversation. "
            "Use the template of the original model"
        )
