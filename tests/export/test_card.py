"""Model cards: what they say is in the files of the run, and no text breaks out of its place."""

import json
import re
import shlex
import shutil
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import textpolicy as tp
from textpolicy.cli import main
from textpolicy.config import TrainConfig, changed, read_toml, to_toml
from textpolicy.export.base_model import hub_id, licence_of
from textpolicy.export.card import write_card
from textpolicy.export.curve_picture import draw_curves
from textpolicy.export.format_facts import FORMAT_FACTS
from textpolicy.export.formats import FORMATS
from textpolicy.export.markdown import code, code_block, plain
from textpolicy.export.proof import Proof
from textpolicy.export.source import Source, find_source
from textpolicy.runs import RunDirectory

PROOF = Proof(
    opened_by="mlx-lm 0.32.2",
    prompts=6,
    tokens=72,
    largest_difference=3e-6,
    tolerance=1e-4,
    adapter_effect=2.0,
    kept=0.9876,
    noise=1e-5,
    equal_greedy=0.75,
    from_merged=4e-6,
)
HOSTILE = [
    "`; **bold** [link](javascript:x) ![image](x.png) <script>alert(1)</script>",
    "```\n---\n# Heading\n<img src=x onerror=alert(1)>\n```",
    "a\n\n---\nlicense: proprietary\n---\n",
    "``two`` and ``` three ticks",
    "| a | cell |\n|---|---|",
    "\x1b[31mred\x1b[0m \u202e reversed \ud800 half",
    "x" * 30_000,
    "$$math$$ &lt;b&gt; <!-- comment",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDirectory:
    """Return a run of four steps, measured after each second step."""
    settings = {
        "task": {"env": "add"},
        "rollout": {"groups_per_step": 4, "group_size": 4},
        "evaluation": {"count": 4, "every": 2},
        "run": {"steps": 4, "seed": 7},
    }
    return tp.run(settings, output=tmp_path_factory.mktemp("card") / "sums").directory


def card_of(source: Source, folder: Path, **changes) -> str:
    """Return the card of an export, which is written into a folder."""
    folder.mkdir(exist_ok=True)
    facts = {"name": "my-export", "format": "peft", "proofs": [PROOF], "commands": ["echo done"]}
    return write_card(folder, source=source, **(facts | changes)).read_text("utf-8")


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(card: str) -> dict[str, str]:
    """Return the tables of a card by the name of the row."""
    rows = re.findall(r"^\| ([^|]+?) \| (.*) \|$", card, re.MULTILINE)
    return {name: value.strip("`") for name, value in rows}


def test_every_format_has_its_facts():
    assert set(FORMATS) <= set(FORMAT_FACTS)


@pytest.mark.parametrize("name", FORMAT_FACTS)
def test_the_front_matter_is_what_the_hub_reads(name, run, tmp_path):
    card = ModelCard(card_of(find_source(run.path), tmp_path, format=name))
    data = card.data.to_dict()
    assert data.pop("library_name") == FORMAT_FACTS[name].loaded_by
    assert {"textpolicy", "reinforcement-learning", "grpo"} <= set(data.pop("tags"))
    # The embedded model is on no hub, so it is no `base_model`.
    assert data == {"license": "mit", "pipeline_tag": "text-generation"}


@pytest.mark.parametrize(("name", "relation"), [("peft", "adapter"), ("hf", "finetune")])
def test_a_base_of_the_hub_is_named_with_its_relation(name, relation, run, tmp_path):
    snapshot = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "abc"
    shutil.copytree(tp.tiny_model(), snapshot)
    source = replace(find_source(run.path), model=str(snapshot))
    card = card_of(source, tmp_path / "out", format=name)
    data = ModelCard(card).data.to_dict()
    assert data["base_model"] == "Qwen/Qwen3-0.6B" and data["base_model_relation"] == relation
    assert str(tmp_path) not in card


def test_the_card_of_a_run_says_what_its_files_say(run, tmp_path):
    card = card_of(find_source(run.path), tmp_path)
    rows, metrics = rows_of(card), rows_in(run.metrics)
    assert rows["environment"] == "add" and rows["reward"] == "that of the environment"
    assert rows["algorithm"] == "grpo" and rows["seed"] == "7" and rows["steps"] == "4"
    assert rows["base"] == "tiny" and rows["rank"] == "16"
    first = metrics[0]
    assert rows["greedy reward on held-out tasks, of the base"] == (
        f"{first['eval/reward']:.3f} ± {first['eval/standard_error']:.3f}"
    )
    assert rows["largest difference of log-probabilities"] == "3.0e-06 (allowed: 1.0e-04)"
    assert rows["share of that change that was kept"] == "98.76%"
    assert rows["equal greedy tokens"] == "75.0%"
    assert rows["largest difference from the rounded weights in memory"] == "4.0e-06"
    assert rows["versions in training"].startswith("textpolicy ")
    assert "\necho done\n" in card and "![" in card


def test_the_values_of_several_rewards_are_beside_the_score(run, tmp_path):
    several = RunDirectory(tmp_path / "several")
    shutil.copytree(run.path, several.path)
    parts = {"eval/rewards/form/mean": 1.0, "eval/rewards/right/mean": 0.25}
    parts |= {"eval/standard_errors/right/mean": 0.125}
    rows = [row | (parts if "eval/reward" in row else {}) for row in rows_in(run.metrics)]
    several.metrics.write_text("\n".join(map(json.dumps, rows)))
    card = card_of(find_source(several.path), tmp_path / "out")
    assert "| numbers beside it, of the base | `form` 1.000, `right` 0.250 ± 0.125 |" in card


def test_the_score_is_that_of_the_exported_adapter_or_names_its_version(run, tmp_path):
    measured = rows_in(run.metrics)
    last = f"{measured[-1]['eval/reward']:.3f} ± {measured[-1]['eval/standard_error']:.3f}"
    source = replace(find_source(run.path), adapter=run.latest)
    assert (
        rows_of(card_of(source, tmp_path))["greedy reward on held-out tasks, of this adapter"]
        == last
    )
    cut = RunDirectory(shutil.copytree(run.path, tmp_path / "cut"))
    (*kept, _) = run.metrics.read_text().splitlines(keepends=True)
    cut.metrics.write_text("".join(kept))
    unmeasured = rows_of(card_of(replace(source, directory=cut), tmp_path / "out"))
    # The row of a step has the measurement before the step, and the version after it.
    row, version = measured[2], f"{measured[1]['version']:.0f}"
    assert unmeasured[f"greedy reward on held-out tasks, of version {version} of the adapter"] == (
        f"{row['eval/reward']:.3f} ± {row['eval/standard_error']:.3f}"
    )


def test_a_score_by_which_the_adapter_was_chosen_is_called_so(run, tmp_path):
    chosen = "was chosen by this score"
    assert chosen in card_of(find_source(run.path), tmp_path)
    last = replace(find_source(run.path), adapter=run.latest)
    assert chosen not in card_of(last, tmp_path)


def test_a_card_without_a_run_leaves_out_what_nobody_knows(trained, tmp_path):
    card = card_of(find_source(trained(None, 0.05), model="tiny"), tmp_path)
    assert "## Result" not in card and "curve" not in card and "seed" not in rows_of(card)
    assert "None" not in card and "nan" not in card
    assert "To continue" not in card
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_an_adapter_that_changes_nothing_is_called_so(run, tmp_path):
    source, nothing = find_source(run.path), "changes nothing that can be measured"
    assert nothing not in card_of(source, tmp_path / "moved")
    idle = replace(PROOF, adapter_effect=0.0, kept=1.0)
    assert nothing in card_of(source, tmp_path / "idle", proofs=[idle])


def test_every_proof_has_a_table_of_its_own(run, tmp_path):
    engines = [replace(PROOF, opened_by=name) for name in ("a reader of GGUF", "llama.cpp")]
    card = card_of(find_source(run.path), tmp_path, proofs=engines)
    assert re.findall(r"\| opened by \| `(.*)` \|", card) == ["a reader of GGUF", "llama.cpp"]


def test_a_card_shows_no_folder_of_this_machine_and_no_completion(run, tmp_path):
    command = f"mlx_lm.generate --model {tp.tiny_model()} --prompt Hello"
    card = card_of(find_source(run.path), tmp_path, commands=[command])
    assert str(run.path.parent) not in card and str(tp.tiny_model()) not in card
    assert "mlx_lm.generate --model tiny --prompt Hello" in card
    assert "`tiny` stands for the folder of the base model" in card
    for row in rows_in(run.samples):
        assert json.dumps(row["prompt"])[1:-1] not in card


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_no_text_of_a_run_breaks_out_of_its_place(text, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoiled = RunDirectory(shutil.copytree(run.path, tmp_path / "spoiled"))
    harmless = card_of(find_source(spoiled.path), tmp_path / "harmless", notes=["A note."])
    quoted = json.dumps(text.replace("\ud800", ""))
    spoiled.config.write_text(
        f"[task]\nenv = {quoted}\ndata = {quoted}\nreward = {quoted}\n"
        f"[algorithm]\nname = {quoted}\nbeta = {quoted}\n[model]\nname = 'tiny'\n"
        f"[run]\nseed = {quoted}\n[trainer]\nlr = {quoted}\n[evaluation]\ncount = {quoted}\n"
    )
    source = find_source(spoiled.path)
    card = card_of(source, tmp_path / "out", name=text, commands=[text], notes=[text])
    assert ModelCard(card).data.to_dict()["license"] == "mit"
    assert len(card) < 40_000
    found, allowed = structure_of(card), structure_of(harmless)
    assert found.keys() <= allowed.keys()
    assert all(found[kind] <= allowed[kind] for kind in ("heading_open", "image", "fence"))
    assert not [char for char in card if ord(char) < 32 and char != "\n"] and "\u202e" not in card


def structure_of(card: str) -> Counter[str]:
    """Return how often each kind of part is in a rendered card."""
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(card).text)
    inline = [child.type for token in tokens for child in token.children or ()]
    return Counter([*(token.type for token in tokens), *inline])


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_escaped_text_is_text(text):
    for span in (code(text), plain(text)):
        (_, inline, _) = MarkdownIt("commonmark").parse(span)
        kinds = {child.type for child in inline.children}
        assert kinds in ({"code_inline"}, {"text"}, {"text", "text_special"})
    (fence,) = MarkdownIt("commonmark").parse(code_block([text]))
    assert fence.type == "fence" and fence.content.count("\n") == 1


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlicense: apache-2.0\n---\n# Base"}, {"license": "apache-2.0"}),
        (
            {"README.md": '---\r\nlicense: other\r\nlicense_name: "my-own"\r\n---\r\n'},
            {"license": "other", "license_name": "my-own"},
        ),
        ({"LICENSE": "  Apache License\n   Version 2.0, January 2004"}, {"license": "apache-2.0"}),
        ({"LICENSE.txt": "MIT License\n\nCopyright"}, {"license": "mit"}),
        ({"LICENSE": "You may do nothing."}, {"license": "other"}),
        ({"README.md": "license: mit"}, {}),
        ({"README.md": "---\nlicense: [mit\n---\n"}, {}),
        ({"README.md": "---\nlicense: !!python/object:os.system\n---\n"}, {}),
        ({}, {}),
    ],
)
def test_the_licence_is_what_the_folder_of_the_base_states(files, licence, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    assert licence_of(tmp_path, {}) == licence


def test_the_licence_of_the_config_counts_where_no_card_states_one(tmp_path):
    assert licence_of(tmp_path, {"license": "mit"}) == {"license": "mit"}
    assert licence_of(tmp_path, {"license": ["x"]}) == {}


def test_only_a_name_that_is_no_folder_is_an_id_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("Qwen/Qwen3-0.6B", tmp_path) == "Qwen/Qwen3-0.6B"
    (tmp_path / "my" / "model").mkdir(parents=True)
    assert hub_id("my/model", tmp_path) is None
    assert hub_id("tiny", tmp_path) is None


def pixels_of(picture: bytes) -> np.ndarray:
    """Return the pixels of a PNG file whose rows have no filter, and check its checksums."""
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(picture):
        (size,) = struct.unpack(">I", picture[place : place + 4])
        kind, data = picture[place + 4 : place + 8], picture[place + 8 : place + 8 + size]
        (check,) = struct.unpack(">I", picture[place + 8 + size : place + 12 + size])
        assert check == zlib.crc32(kind + data)
        chunks[kind] = data
        place += 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_the_picture_shows_where_the_curve_rises():
    image = pixels_of(draw_curves([[(0, 0.0), (10, 0.0), (11, 1.0), (20, 1.0)]]))
    is_blue = (image[:, :, 2] > 150) & (image[:, :, 0] < 100)
    columns = np.flatnonzero(is_blue.any(axis=0))
    heights = [np.flatnonzero(is_blue[:, column]).mean() for column in (columns[5], columns[-5])]
    assert heights[0] > 250 and heights[1] < 30


@pytest.mark.parametrize(
    "curve",
    [
        [(0, 0.5)],
        [(0, 0.0), (1, 0.0)],
        [(0, 1e300), (1, -1e300)],
        [(3, 0.1), (3, 0.2)],
        [(0, 0.1), (1, 0.1 + 1e-17), (2, 0.1)],
        [(step, step % 7 - 3e-9) for step in range(0, 20_000, 7)],
    ],
)
def test_every_curve_can_be_drawn(curve):
    assert pixels_of(draw_curves([curve, curve])).shape == (320, 720, 3)


def test_the_line_that_continues_training_has_the_data_and_the_lengths_of_the_run(run, tmp_path):
    own = RunDirectory(tmp_path / "own")
    shutil.copytree(run.path, own.path)
    given = {"task.env": None, "task.data": "rows.jsonl", "task.eval_data": "/far/held.jsonl"}
    given |= {"task.reward": "mine.py", "sampling.max_tokens": 12}
    own.write_config(to_toml(changed(read_toml(run.config, TrainConfig()), given)))
    card = card_of(find_source(own.path), tmp_path / "out")
    (line,) = re.findall(r"^textpolicy (train .*)$", card, re.MULTILINE)
    task = "train --data rows.jsonl --eval-data held.jsonl --reward mine.py --max-tokens 12 "
    assert line.startswith(task)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FORMATS if FORMAT_FACTS[name].continued_by])
def test_the_line_that_continues_training_works(name, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tp.export_adapter(run.path, name, tmp_path / "my export")
    card = (tmp_path / "my export" / "README.md").read_text()
    (line,) = re.findall(r"^textpolicy (train .*)$", card, re.MULTILINE)
    small = ["--steps", "1", "--count", "2", "--group-size", "2", "--groups-per-step", "2"]
    assert "'my export" in line and main([*shlex.split(line), *small, "--max-tokens", "2"]) == 0


def test_the_card_and_the_picture_are_files_of_the_export(run, tmp_path):
    tp.export_adapter(run.path, "peft", tmp_path / "out")
    files = json.loads((tmp_path / "out" / "export.json").read_text())["files"]
    assert {"README.md", "curve.png"} <= set(files)
    assert pixels_of((tmp_path / "out" / "curve.png").read_bytes()).shape == (320, 720, 3)
