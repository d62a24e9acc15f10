"""Model folders and chat templates of strangers: an error of ours or a model that answers."""

import time
from pathlib import Path

import pytest

from tests.faults.attempts import Attempts
from tests.security.hostile_models import copy_of_tiny, hostile_folders, hostile_templates
from textpolicy.errors import ModelError, PromptError
from textpolicy.generation.mlx_generation import create_policy, load_model
from textpolicy.untrusted.template_check import check_template_ends

FOLDERS = dict(hostile_folders())
TEMPLATES = dict(hostile_templates())


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file that only code of a model would make."""
    path = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(path))
    monkeypatch.syspath_prepend(str(tmp_path))
    code = "import os\nopen(os.environ['CANARY'], 'w').close()\n"
    (tmp_path / "evil.py").write_text(code)
    return path


def use(folder: Path) -> str:
    """Load a model, and let it answer. Return "answered", or the name of our error."""
    (folder / "evil.py").write_text("import os\nopen(os.environ['CANARY'], 'w').close()\n")
    try:
        model, tokenizer = load_model(folder)
        policy = create_policy(model, tokenizer, {"max_tokens": 1})
        policy([{"role": "user", "content": "1+1="}])
    except (ModelError, PromptError) as error:
        assert 20 < len(str(error)) < 5000
        return type(error).__name__
    return "answered"


@pytest.mark.slow
@pytest.mark.proves("S3")
@pytest.mark.filterwarnings("ignore")
def test_a_hostile_model_folder_is_refused_with_an_error_or_answers(
    tmp_path: Path, canary: Path, attempts: Attempts
) -> None:
    found = {}
    for number, (name, spoil) in enumerate(FOLDERS.items()):
        folder = copy_of_tiny(tmp_path / f"model-{number}")
        spoil(folder)
        started = time.monotonic()
        found[name] = use(folder)
        assert time.monotonic() - started < 30, name
        assert not canary.exists(), name
        attempts.add()
    assert len(found) >= 241
    # The generator is worth its name: most folders are refused.
    assert sum(end != "answered" for end in found.values()) > len(found) / 2


@pytest.mark.parametrize(
    "every",
    [
        pytest.param(4, marks=pytest.mark.slow, id="each fourth"),
        pytest.param(1, marks=pytest.mark.long, id="all"),
    ],
)
@pytest.mark.proves("S3")
@pytest.mark.filterwarnings("ignore")
def test_a_hostile_chat_template_is_refused_with_an_error_or_answers(
    tmp_path: Path, canary: Path, attempts: Attempts, every: int
) -> None:
    assert len(TEMPLATES) >= 74
    for number, (name, template) in enumerate(list(TEMPLATES.items())[::every]):
        folder = copy_of_tiny(tmp_path / f"model-{number}")
        (folder / "chat_template.jinja").write_text(template, errors="surrogatepass")
        started = time.monotonic()
        end = use(folder)
        assert time.monotonic() - started < 90, name
        assert not canary.exists(), name
        assert end != "answered" or not name.startswith("endless"), name
        attempts.add()


def test_each_of_several_templates_must_end() -> None:
    endless = "{{ 'a' * 10**10 }}"
    check_template_ends({"default": "{{ messages[0].content }}"})
    check_template_ends(None)
    with pytest.raises(ModelError, match="does not come to an end"):
        check_template_ends({"default": "{{ messages[0].content }}", "tool_use": endless})
