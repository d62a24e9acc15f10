"""The directory of a run: one writer, adapters by version, and no run overwritten."""

import os
import signal
import subprocess
import sys

import pytest

from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.errors import ConfigError
from textpolicy.runs.directory import RunDirectory, new_directory

HOLD = """
import sys, time
from pathlib import Path
from textpolicy.runs import RunDirectory
with RunDirectory(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""

ASK = """
import sys
from pathlib import Path
from textpolicy.runs import RunDirectory
directory = RunDirectory(Path(sys.argv[1]))
print("asking", flush=True)
while True:
    directory.is_running
"""


def test_a_second_writer_is_refused_with_the_process_id_of_the_first(tmp_path):
    directory = RunDirectory(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout
    with holder, holder.stdout:
        assert holder.stdout.readline() == "held\n"
        assert directory.is_running
        refused = pytest.raises(ConfigError, match=f"process {holder.pid} is writing the run")
        with refused, directory.lock():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert not directory.is_running
    with directory.lock():
        pass


def test_asking_whether_a_run_is_running_writes_no_file(tmp_path):
    assert not RunDirectory(tmp_path).is_running
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("versions", "left"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6]),
        ([*range(1, 9)], [1, *range(4, 9)]),
    ],
)
def test_the_last_five_adapters_and_the_best_are_kept(tmp_path, versions, left):
    directory = RunDirectory(tmp_path)
    directory.adapters.mkdir()
    for version in versions:
        directory.adapter_of(version).touch()
    directory.remove_kept_adapters(last=5, best=1 if len(versions) > 6 else None)
    assert sorted(int(path.stem) for path in directory.adapters.iterdir()) == left


def test_kept_adapters_stay_what_they_were_when_the_latest_is_replaced(load_tiny, tmp_path):
    directory = RunDirectory(tmp_path)
    model, _ = load_tiny()
    adapters = AdapterContainer.from_model(model, AdapterConfig(rank=2))
    for _ in range(2):
        adapters.advance()
        adapters.publish(directory.latest)
        directory.keep_adapter(directory.latest)
        directory.keep_adapter(directory.latest, "best")
    names = sorted(path.name for path in directory.adapters.iterdir())
    assert names == [
        "00000001.safetensors",
        "00000002.safetensors",
        "best.safetensors",
        "latest.safetensors",
    ]
    versions = [AdapterContainer.from_directory(directory.adapters / n).version for n in names]
    assert versions == [1, 2, 2, 2]
    # Hard links take no space.
    assert os.stat(directory.latest).st_ino == os.stat(directory.best).st_ino


def test_keeping_one_version_twice_leaves_no_other_name_behind(load_tiny, tmp_path):
    directory = RunDirectory(tmp_path)
    model, _ = load_tiny()
    AdapterContainer.from_model(model, AdapterConfig(rank=2)).publish(directory.latest)
    for _ in range(2):
        directory.keep_adapter(directory.latest, "best")
    assert sorted(p.name for p in directory.adapters.iterdir()) == [
        "best.safetensors",
        "latest.safetensors",
    ]


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path):
    directory = RunDirectory(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    alive = f".report.{os.getppid()}-abcd1234.partial.html"
    with directory.lock():
        directory.rejected_batches.mkdir()
        places = (tmp_path, directory.adapters, directory.checkpoints, directory.rejected_batches)
        for place in places:
            (place / f".latest.{ended.pid}-abcd1234.partial.safetensors").write_text("")
            (place / ".latest.json").write_text("of somebody else")
            (place / ".latest.partial.json").write_text("of somebody else")
            # Another process writes its report into a run that starts.
            (place / alive).write_text("")
        directory.remove_partial_files()
    left = {path.name for path in tmp_path.rglob(".*")}
    assert left == {".latest.json", ".latest.partial.json", alive, ".textpolicy-run", ".running"}


def test_asking_whether_a_run_is_running_never_refuses_a_start(tmp_path):
    directory = RunDirectory(tmp_path)
    with directory.lock():
        pass
    asking = subprocess.Popen([sys.executable, "-c", ASK, str(tmp_path)], stdout=subprocess.PIPE)
    assert asking.stdout
    with asking, asking.stdout:
        assert asking.stdout.readline() == b"asking\n"
        for _ in range(300):
            with directory.lock():
                pass
        asking.kill()


def test_a_config_is_replaced_whole_or_not_at_all(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_config("steps = 4\n")
    # This text cannot be encoded, which only the write finds.
    with pytest.raises(UnicodeEncodeError):
        directory.write_config("steps = '\udc80'\n")
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
    assert directory.config.read_text() == "steps = 4\n"
    directory.write_config("steps = 5\n")
    assert directory.config.read_text() == "steps = 5\n"


def test_a_new_run_never_takes_an_existing_directory(tmp_path):
    first = new_directory("hf:open/gsm8k", tmp_path)
    assert first.path.name == "hf-open-gsm8k"
    first.claim()
    second = new_directory("hf:open/gsm8k", tmp_path)
    assert second.path.name == "hf-open-gsm8k-2"
    first.adapters.mkdir()
    first.latest.write_text("")
    with pytest.raises(ConfigError, match=f"--resume {first.path}"):
        first.claim()


def test_a_directory_that_cannot_be_made_is_an_error_before_anything_else(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to the output folder"):
        RunDirectory(tmp_path / "file" / "run").claim()


@pytest.mark.parametrize("inside", ["", "runs/mine"])
def test_a_folder_behind_a_link_to_nothing_is_refused_with_the_link_and_its_target(
    tmp_path, inside
):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "unmounted")
    told = rf"{link} is a symbolic link to {tmp_path / 'unmounted'}, which is not there"
    with pytest.raises(ConfigError, match=told):
        RunDirectory(link / inside).claim()
    (tmp_path / "unmounted").mkdir()
    RunDirectory(link / inside).claim()
