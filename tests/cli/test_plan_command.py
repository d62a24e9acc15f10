"""`textpolicy plan`: an adapter config from flags or from a file."""

import json

import pytest

from textpolicy.cli.main import main


def test_the_command_plans_from_words_or_from_a_file(capsys, tmp_path):
    assert main(["plan", "--rank", "8", "--keys", "self_attn.q_proj", "--json"]) == 0
    from_words = json.loads(capsys.readouterr().out)
    form = {"target_modules": ["q_proj"], "r": 8, "lora_alpha": 16}
    (tmp_path / "adapter.json").write_text(json.dumps(form))
    assert main(["plan", "--adapter-config", str(tmp_path / "adapter.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == from_words
    adapted = {row["path"] for row in from_words["modules"] if row["kind"] == "lora"}
    assert adapted == {f"model.layers.{i}.self_attn.q_proj" for i in range(len(adapted))}
    assert main(["plan", "--kind", "dora"]) == 0
    assert " dora " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("{}", ["--rank", "4"], "given together with ['rank']. Set these options in"),
        ("{", [], "is not JSON"),
        ("[]", [], "holds a list"),
        ('{"target_modules": ["query"]}', [], "'query', which matches nothing"),
    ],
)
def test_the_command_says_what_it_cannot_plan(capsys, tmp_path, content, words, message):
    path = tmp_path / "adapter.json"
    path.write_text(content)
    assert main(["plan", "--adapter-config", str(path), *words]) in (1, 2)
    assert message in capsys.readouterr().err
