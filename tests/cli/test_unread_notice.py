"""Commands say once which characters of the prompts the model cannot read."""

import json

from tests.serving.command import serve_while
from textpolicy.cli import main

NOTICE = "the embedded model has learned no characters beyond ASCII"


def test_generate_says_what_the_model_cannot_read(capsys):
    ask = ("generate", "--max-tokens", "1", "--prompt")
    assert main([*ask, "12+34="]) == 0 and capsys.readouterr().err == ""
    assert main([*ask, "Größe"]) == 0
    out, err = capsys.readouterr()
    assert err.count(NOTICE) == 1 and "prompts: ß ö." in err and NOTICE not in out


def test_the_server_says_it_once(capsys):
    def ask(client):
        for text in ("Größe", "日本"):
            asked = [{"role": "user", "content": text}]
            client.chat.completions.create(model="tiny", messages=asked, max_tokens=1)
        client.completions.create(model="tiny", prompt="Größe", max_tokens=1)

    serve_while(["serve", "--no-token"], ask)
    assert capsys.readouterr().err.count(NOTICE) == 1


def test_check_and_the_start_of_a_run_name_the_characters_of_the_rows(tmp_path, capsys):
    import textpolicy as tp

    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"sort {n}{'é' * (n > 10)}", "answer": "1"}) for n in range(40)]
    rows.write_text("\n".join(lines))
    main(["check", "exact_match", "--data", str(rows)])
    assert capsys.readouterr().out.count(f"{NOTICE}, and these are 1 different character") == 1
    notes: list[str] = []
    tp.run(
        {
            "task": {"data": str(rows), "reward": "exact_match"},
            "run": {"steps": 1},
            "rollout": {"groups_per_step": 1, "group_size": 2},
            "sampling": {"max_tokens": 2},
            "evaluation": {"count": 4},
        },
        output=tmp_path / "run",
        on_event=lambda event: notes.append(event.text),
    )
    assert sum(NOTICE in note for note in notes) == 1
