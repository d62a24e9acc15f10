"""Addresses of rows: configurations, splits, revisions, and local copies in the hub's layouts."""

import json
import os
import shutil
import subprocess
import sys
from itertools import islice

import pytest

from tests.environments.layouts import (
    MATH,
    sums,
    write_card,
    write_jsonl,
    write_parquet,
    write_sums,
)
from tests.hub_server import COMMIT, TOKEN, Repository, serving_hub
from textpolicy.environments import load_rows
from textpolicy.environments.data_address import DataAddress
from textpolicy.environments.data_files import iterate_rows, load_rows_with_locations
from textpolicy.environments.data_source import DataSource
from textpolicy.errors import DataError


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return the folder of a data set with the configurations main and long."""
    return write_sums(tmp_path_factory.mktemp("data") / "sums")


@pytest.mark.parametrize(
    ("text", "place", "parts", "revision"),
    [
        ("hf:openai/gsm8k", "openai/gsm8k", (), None),
        ("hf:openai/gsm8k:main", "openai/gsm8k", ("main",), None),
        ("hf:openai/gsm8k:main:train", "openai/gsm8k", ("main", "train"), None),
        ("hf:openai/gsm8k@v1.0:main:test", "openai/gsm8k", ("main", "test"), "v1.0"),
        (
            "hf:openai/gsm8k:main:test@refs/convert",
            "openai/gsm8k",
            ("main", "test"),
            "refs/convert",
        ),
    ],
)
def test_an_address_of_the_hub_has_a_configuration_a_split_and_a_revision(
    text, place, parts, revision
):
    address = DataAddress.parse(text)
    assert (address.place, address.parts, address.revision) == (place, parts, revision)
    assert DataAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    "text", ["hf:", "hf:a/b/c", "hf:a/b:c:d:e", "hf:a/b@1:c@2", "hf:../x", "hf:a b", "hf:a/b:"]
)
def test_what_is_no_address_of_the_hub_is_refused_with_the_form(text):
    with pytest.raises(DataError, match=r"expected hf:OWNER/NAME\[@REVISION\]\[:CONFIG\]\[:SPLIT"):
        DataAddress.parse(text)


def test_a_path_with_colons_is_a_path_and_names_behind_a_folder_are_not(tmp_path):
    write_jsonl(tmp_path / "a:b.jsonl", sums(0, 3))
    assert load_rows(tmp_path / "a:b.jsonl") == sums(0, 3)
    assert DataAddress.parse(f"{tmp_path}:main:test").parts == ("main", "test")
    assert DataAddress.parse("nowhere:main").parts == ()


def test_a_copy_of_a_data_set_is_read_by_configuration_and_split(copy):
    assert load_rows(f"{copy}:main:train") == sums(0, 40)
    assert load_rows(f"{copy}:long:test") == sums(150, 10)
    assert load_rows(f"{copy}:main") == sums(0, 40)
    locations = [where for where, _ in load_rows_with_locations(f"{copy}:main:test")]
    assert locations[:2] == [f"{copy}:main:test, row 1", f"{copy}:main:test, row 2"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "",
            r"has several configurations; its .* are \['main', 'long'\]\. Write .*:main$",
        ),
        (":mian", r"has no configuration 'mian'.* are \['main', 'long'\]\. Write .*sums:main$"),
        (":train", r"has no configuration 'train'; its configurations are \['main', 'long'\]"),
        (":main:tets", r"has no split 'tets'; its splits are \['train', 'test'\]\. .*:main:test$"),
    ],
)
def test_a_missing_or_ambiguous_name_is_refused_with_the_names_that_exist(copy, names, message):
    with pytest.raises(DataError, match=message):
        load_rows(f"{copy}{names}")


def test_rows_to_measure_on_need_a_split_where_there_are_several(copy):
    source = DataSource(train=f"{copy}:main", held_out=f"{copy}:main")
    with pytest.raises(DataError, match=r"has several splits; its splits are \['train', 'test'\]"):
        source.tasks("{question}", name="sums")


def test_a_name_that_is_a_configuration_and_a_split_is_ambiguous(tmp_path):
    write_parquet(tmp_path / "rows.parquet", sums(0, 3))
    write_card(tmp_path, {"test": {"train": "rows.parquet", "test": "rows.parquet"}})
    with pytest.raises(
        DataError, match=r"ambiguous: 'test' is a configuration and a split\. Write"
    ):
        load_rows(f"{tmp_path}:test")
    assert load_rows(f"{tmp_path}:test:test") == sums(0, 3)
    assert load_rows(f"{tmp_path}:train") == sums(0, 3)


def test_layouts_without_a_card_are_read(tmp_path):
    for shard in (0, 1):
        name = f"data/train-0000{shard}-of-00002.parquet"
        write_parquet(tmp_path / "shards" / name, sums(5 * shard, 5))
    assert load_rows(tmp_path / "shards") == sums(0, 10)
    write_jsonl(tmp_path / "lines" / "train.jsonl", sums(0, 4))
    write_jsonl(tmp_path / "lines" / "test.jsonl", sums(4, 2))
    assert load_rows(f"{tmp_path / 'lines'}:test") == sums(4, 2)
    write_jsonl(tmp_path / "packed" / "train.jsonl.gz", sums(0, 4))
    assert load_rows(tmp_path / "packed") == sums(0, 4)
    assert load_rows(write_parquet(tmp_path / "one.parquet", sums(0, 4))) == sums(0, 4)
    write_jsonl(tmp_path / "only" / "test.jsonl", sums(0, 2))
    assert load_rows(tmp_path / "only") == sums(0, 2)


def test_packed_files_are_read_and_damaged_ones_are_errors_with_the_line(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl.gz", sums(0, 500))
    assert load_rows(path) == sums(0, 500)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz, line \d+: cannot be read \(Compressed"):
        load_rows(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz, line 1: cannot be read \(Not a gzipped"):
        load_rows(path)


def test_a_card_cannot_name_files_outside_of_its_folder(tmp_path):
    secret = write_jsonl(tmp_path / "secret.jsonl", sums(0, 3))
    https = ("https://127.0.0.1:9/a", '"https\\x3a//x"', "*name")
    for path in ("../secret.jsonl", str(secret), *https):
        write_card(tmp_path / "copy", {"default": {"train": path}})
        with pytest.raises(DataError, match=r"outside of the folder|name files by an address"):
            load_rows(tmp_path / "copy")
    (tmp_path / "copy" / "inner.jsonl").symlink_to(secret)
    write_card(tmp_path / "copy", {"default": {"train": "inner.jsonl"}})
    with pytest.raises(DataError, match=r"outside of the folder"):
        load_rows(tmp_path / "copy")


def test_a_card_may_have_links_outside_of_its_configs(copy, tmp_path):
    card = (copy / "README.md").read_text()
    card = card.replace("configs:", "license_link: https://a.b/c\nconfigs:")
    card = card.replace("---\n# Sums", "dataset_info: {}\n---\n# Sums\n\n- [a](https://a.b)\n---")
    shutil.copytree(copy, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text(card)
    assert load_rows(f"{tmp_path / 'copy'}:main:test") == sums(50, 10)


def test_a_snapshot_in_the_cache_of_the_hub_is_read(tmp_path):
    blob = write_jsonl(tmp_path / "datasets--ada--sums" / "blobs" / "c0ffee", sums(0, 3))
    snapshot = tmp_path / "datasets--ada--sums" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").symlink_to(blob)
    assert load_rows(snapshot) == sums(0, 3)


def test_only_readers_of_tables_are_used(tmp_path):
    (tmp_path / "page.xml").write_text("<rows><row>1</row></rows>")
    with pytest.raises(DataError, match=r"reader 'xml' of the datasets library; allowed are parq"):
        load_rows(tmp_path)


@pytest.mark.parametrize(
    "card",
    [
        "---\n" + "[" * 500 + "\n---\n",
        "---\nconfigs: 3\n---\n",
        "---\nconfigs:\n- config_name: [1, 2]\n  data_files: {a: {b: c}}\n---\n",
        "---\nconfigs:\n- {}\n---\n",
        "---\n!!python/object/apply:os.system ['touch hacked']\n---\n",
        "\udcff---\n",
    ],
)
def test_a_damaged_card_is_an_error_with_the_address(tmp_path, monkeypatch, card):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "copy" / "train.jsonl", sums(0, 3))
    (tmp_path / "copy" / "README.md").write_text(card, errors="surrogateescape")
    try:
        assert load_rows(tmp_path / "copy") == sums(0, 3)
    except DataError as error:
        assert str(tmp_path / "copy") in str(error)
    assert not (tmp_path / "hacked").exists()


def test_an_empty_folder_and_a_damaged_table_are_errors_with_the_address(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*any data files"):
        load_rows(tmp_path)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"cannot read .*rows\.parquet"):
        load_rows(tmp_path / "rows.parquet")


def test_a_folder_that_the_library_would_read_in_place_of_the_hub_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(write_sums(tmp_path / "ada" / "sums").parents[1])
    with pytest.raises(DataError, match=r"would read the folder 'ada/sums' of the working directo"):
        load_rows("hf:ada/sums:main:test")
    assert load_rows("ada/sums:main:test") == sums(50, 10)


PROGRAM = """
import json, sys
from itertools import islice
from textpolicy.cli import main
from textpolicy.environments import load_rows
from textpolicy.environments.data_files import iterate_rows
from textpolicy.errors import DataError

found = {}
for address in sys.argv[1:]:
    try:
        found[address] = load_rows(address)
    except DataError as error:
        found[address] = str(error)
found["streamed"] = list(islice(iterate_rows("hf:ada/sums:main:train"), 2))
small = ["--steps", "1", "--groups-per-step", "1", "--group-size", "2", "--max-tokens", "2"]
data = ["--data", "hf:ada/sums:main:train", "--eval-data", "hf:ada/sums:main:test"]
assert main(["train", "--env", "gsm8k", *data, *small, "--output", "run"]) == 0
assert main(["eval", "--env", "math500", "--max-tokens", "2"]) == 0
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_hub_serves_data_sets_to_the_command(copy, tmp_path):
    files = {str(p.relative_to(copy)): p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    addresses = [
        *("hf:ada/sums:main:test", f"hf:ada/sums@{COMMIT}:long:train", "hf:ada/sums"),
        *("hf:ada/sums:main:dev", "hf:ada/none", "hf:ada/sums:main@v9"),
    ]
    with serving_hub() as hub:
        hub.datasets["ada/sums"] = Repository(private=False, files=files)
        lines = "".join(json.dumps(row) + "\n" for row in MATH[:9]).encode()
        hub.datasets["HuggingFaceH4/MATH-500"] = Repository(False, {"test.jsonl": lines})
        known = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *addresses],
            env=os.environ | known | {"HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    test, old, several, wrong, none, revision = (found[address] for address in addresses)
    assert (test, old) == (sums(50, 10), sums(100, 40))
    assert "its configurations are ['main', 'long']" in several
    assert "its splits are ['train', 'test']" in wrong
    assert "doesn't exist on the Hub" in none and "'v9' doesn't exist" in revision
    assert [row for _, row in found["streamed"]] == sums(0, 2)
    assert "10 held-out tasks" in done.stdout
    # A suite without rows of its own downloads them, and all are measured.
    assert "tiny on 9 held-out tasks of math500" in done.stdout
    config = (tmp_path / "run" / "config.toml").read_text()
    assert 'eval_data = "hf:ada/sums:main:test"' in config


def test_streaming_reads_no_more_rows_than_are_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sums(0, 3)) + "no row\n")
    assert [row for _, row in islice(iterate_rows(path), 3)] == sums(0, 3)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 4: not a row of JSON"):
        list(iterate_rows(path))
