"""A run whose files, surroundings or machine changed between two processes."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

import textpolicy as tp
from tests.quick import quick_first
from textpolicy.cli import main
from textpolicy.errors import ConfigError
from textpolicy.experiment import identity
from textpolicy.generation.model_files import tiny_model
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_metrics
from textpolicy.training.checkpoint import Checkpoints

CLOCKS = ("time/", "memory/", "tokens_per_second")
# The type checks of these tests draw numbers of Python's own.
REWARD = """
import random

import numpy as np

from helper import weight

random.seed(7)
np.random.seed(7)


def reward(completion):
    return weight * (np.random.random() + {more})
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with a model, rows, and the code of a reward and of an algorithm."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(tiny_model(), folder / "model")
    (folder / "reward.py").write_text(REWARD.format(more=0))
    (folder / "helper.py").write_text("weight = 0.5\n")
    rows = [{"prompt": f"{n}+{n}="} for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def options_of(files):
    return {
        "task": {"data": str(files / "rows.jsonl"), "reward": str(files / "reward.py")},
        "model": {"name": str(files / "model")},
        "sampling": {"max_tokens": 4, "temperature": 2.0},
        "rollout": {"groups_per_step": 2, "group_size": 2},
        "evaluation": {"count": 2, "every": 1},
    }


def stop_after(step):
    def listen(event):
        return tp.Progress.STOP if event.kind == "step" and event.step >= step else None

    return listen


@pytest.fixture(scope="module")
def stopped(files, tmp_path_factory):
    """Return the folder of a run of 3 steps that was stopped after the second."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    tp.run(options_of(files) | {"run": {"steps": 3}}, output=folder, on_event=stop_after(2))
    return folder


@pytest.fixture
def copies(files, stopped, tmp_path, monkeypatch):
    """Return copies of the run and of its files, at the paths that the run knows."""
    run, own = tmp_path / "run", tmp_path / "files"
    shutil.copytree(stopped, run)
    shutil.copytree(files, own, copy_function=shutil.copy2)
    yield run, files
    shutil.rmtree(files)
    shutil.copytree(own, files, copy_function=shutil.copy2)


def rows_of(folder):
    return [
        {name: value for name, value in row.items() if not name.startswith(CLOCKS)}
        for row in read_metrics(RunDirectory(folder).metrics)
    ]


def flip_one_weight(path):
    """Flip one bit of one weight, which no sample of the weights sees; the size stays."""
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 1
    path.write_bytes(data)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


CHANGES = {
    "model: model.safetensors has changed": lambda own: flip_one_weight(
        own / "model" / "model.safetensors"
    ),
    "model: chat_template.jinja has changed": lambda own: (
        own / "model" / "chat_template.jinja"
    ).write_text("{{ messages[0]['content'] }}"),
    "model: tokenizer_config.json has changed": lambda own: edit(
        own / "model" / "tokenizer_config.json", "{", "{ "
    ),
    "reward: reward.py has changed": lambda own: edit(
        own / "reward.py", "weight *", "2 * weight *"
    ),
    "reward: helper.py has changed": lambda own: edit(own / "helper.py", "0.5", "0.25"),
    "rows: rows.jsonl has changed": lambda own: edit(own / "rows.jsonl", "11+11", "11 + 11"),
}


@pytest.mark.proves("F22")
@pytest.mark.parametrize("told", quick_first(1, CHANGES))
def test_a_changed_file_is_named_and_refused_unless_forced(copies, attempts, capsys, told):
    run, own = copies
    before = RunDirectory(run).config.read_bytes()
    CHANGES[told](own)
    assert main(["train", "--resume", str(run)]) == 2
    message = capsys.readouterr().err
    assert f"\n  {told}\n" in message and "--force" in message
    assert RunDirectory(run).config.read_bytes() == before
    assert main(["train", "--resume", str(run), "--force"]) == 0
    assert f"resuming although {told}" in capsys.readouterr().err
    # The checkpoint of the forced resume knows the new files.
    assert main(["train", "--resume", str(run)]) == 0
    attempts(3)


def test_the_hash_of_a_large_file_is_read_once_and_again_after_any_write(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_CACHED_FROM", 10)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(100))
    first = identity.hash_of(path)
    cache = tmp_path / "cache" / "textpolicy" / "hashes.json"
    entry = json.loads(cache.read_text())[str(path)]
    assert (entry[-1], cache.stat().st_mode & 0o777) == (first, 0o600)
    # The cache is believed: a wrong hash in it comes back.
    cache.write_text(json.dumps({str(path): [*entry[:-1], "cached"]}))
    assert identity.hash_of(path) == "cached"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(bytes(99) + b"x")
    os.utime(path, ns=times)
    assert identity.hash_of(path) not in (first, "cached")
    for damage in ("[", "[]", '{"a": 1}', "[" * 9999):
        cache.write_text(damage)
        assert len(identity.hash_of(path)) == 64


WHOLE_AND_RESUMED = """
import json, random, sys
from pathlib import Path
import numpy as np
import textpolicy as tp

options, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
stop = lambda event: tp.Progress.STOP if event.kind == "step" and event.step >= 2 else None
tp.run(options, output=folder / "whole")
tp.run(options, output=folder / "stopped", on_event=stop)
random.seed(99)
np.random.seed(99)
tp.run(resume=folder / "stopped")
"""


@pytest.mark.slow
def test_random_numbers_of_a_reward_continue_where_the_run_was_stopped(files, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD.format(more="random.random()"))
    (tmp_path / "helper.py").write_text("weight = 0.5")
    options = options_of(files) | {"run": {"steps": 4}}
    options["task"]["reward"] = str(tmp_path / "reward.py")
    # Another process, because the type checks of these tests draw random numbers too.
    script = [sys.executable, "-c", WHOLE_AND_RESUMED, json.dumps(options), str(tmp_path)]
    subprocess.run(script, check=True, timeout=240, capture_output=True)
    whole = rows_of(tmp_path / "whole")
    assert rows_of(tmp_path / "stopped") == whole
    assert len({row["reward"] for row in whole[:4]}) == 4


@pytest.mark.slow
@pytest.mark.proves("F22")
def test_lost_and_damaged_metrics_are_told_and_stop_no_resume(files, copies, attempts, capsys):
    run, _ = copies
    metrics = RunDirectory(run).metrics
    lines = metrics.read_text().splitlines(keepends=True)
    whole = run.parent / "whole"
    shutil.copytree(run, whole)
    assert main(["train", "--resume", str(whole)]) == 0
    damages = {
        "has no rows of 2 steps, from step 0 on": "",
        "has no rows of 1 steps, from step 0 on": lines[1],
        "has no rows of 1 steps, from step 1 on": lines[0] + lines[1][:20],
        "was damaged": "\x00\x00\n" + lines[0] + '{"step": [1]}\n' + lines[1],
    }
    for told, content in damages.items():
        copy = run.parent / f"copy-{len(content)}"
        shutil.copytree(run, copy)
        (copy / "metrics.jsonl").write_text(content)
        capsys.readouterr()
        assert main(["train", "--resume", str(copy), "--json"]) == 0
        out, err = capsys.readouterr()
        assert told in err
        assert rows_of(copy)[-2:] == rows_of(whole)[-2:]
        assert json.loads(out)["before"]["reward"] == rows_of(whole)[0]["eval/reward"]
        attempts.add()
    (run / "metrics.jsonl").unlink()
    (run / "config.toml").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    attempts.add()


@pytest.mark.proves("F22")
def test_an_edited_config_is_a_changed_option(copies, attempts, capsys):
    run, _ = copies
    config = RunDirectory(run).config
    edit(config, "lr = 0.0005", "lr = 0.05")
    assert main(["train", "--resume", str(run)]) == 2
    assert "trainer.lr: 0.0005 before, 0.05 now" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--force"]) == 0
    rates = [row["learning_rate"] for row in rows_of(run) if "learning_rate" in row]
    assert rates == pytest.approx([0.0005, 0.0005, 0.05])
    # The line that a stopped run prints needs no --force.
    assert main(["train", "--resume", str(run)]) == 0
    attempts(2)


@pytest.mark.proves("F22")
def test_another_shape_of_the_adapters_is_refused_by_its_option_with_force_too(
    copies, attempts, capsys
):
    run, _ = copies
    before = RunDirectory(run).config.read_bytes()
    shapes = {
        "adapter.rank": ["--rank", "8"],
        "adapter.kind": ["--kind", "dora"],
        "adapter.num_layers": ["--num-layers", "1"],
        "adapter.keys": ["--keys", "self_attn.q_proj"],
        "adapter.target_modules": ["--target-modules", "q_proj"],
        "model.quantize": ["--quantize", "4"],
    }
    for key, flags in shapes.items():
        assert main(["train", "--resume", str(run), *flags, "--force"]) == 2
        message = capsys.readouterr().err
        assert f"{key}: not given before, " in message
        assert f"The checkpoint is bound to {key}, and --force does not change that" in message
        assert RunDirectory(run).config.read_bytes() == before
        attempts.add()


@pytest.mark.slow
def test_a_forced_option_holds_although_the_process_ends_before_the_next_checkpoint(copies):
    run, _ = copies
    edit(RunDirectory(run).config, "lr = 0.0005", "lr = 0.05")

    def interrupt(event):
        if event.kind == "start":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tp.run(resume=run, force=True, on_event=interrupt)
    assert tp.run(resume=run).ended == "finished"


@pytest.mark.slow
def test_more_steps_need_no_force_and_a_finished_run_says_so(copies, capsys):
    run, _ = copies
    resume = ["train", "--resume", str(run)]
    assert main(resume) == 0
    capsys.readouterr()
    assert main(resume) == 0
    told = capsys.readouterr().err
    assert "The run is finished: all 3 steps are done." in told
    assert f"textpolicy train --resume {run} --steps 6" in told
    assert main([*resume, "--steps", "4"]) == 0
    assert [row["step"] for row in rows_of(run)] == [0, 1, 2, 3, 4]
    assert main([*resume, "--steps", "2", "--force"]) == 2
    assert "has 4 steps already, and --steps is 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_without_its_checkpoints_keeps_its_adapters(copies, capsys):
    run, _ = copies
    assert main(["train", "--resume", str(run)]) == 0
    shutil.rmtree(run / "checkpoints")
    before = (run / "adapters" / "latest.safetensors").read_bytes()
    for argv in (["--resume", str(run)], ["--resume", str(run), "--force"]):
        assert main(["train", *argv]) == 2
        assert "Put the checkpoints back, or start a new run" in capsys.readouterr().err
    assert main(["train", "--env", "add", "--output", str(run)]) == 2
    assert (run / "adapters" / "latest.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_new_start_keeps_no_adapter_of_a_start_that_saved_no_checkpoint(files, tmp_path):
    run = RunDirectory(tmp_path / "run")
    tp.run(options_of(files) | {"run": {"steps": 1}}, output=run.path)
    # As after a kill between the first published adapter and the first checkpoint.
    for path in run.checkpoints.iterdir():
        path.unlink()
    shutil.copyfile(run.latest, run.adapter_of(77))
    run.metrics.write_text(run.metrics.read_text().splitlines(keepends=True)[0])
    tp.run({"run": {"steps": 2}}, resume=run.path)
    kept = {path.stem for path in run.adapters.iterdir()}
    assert kept == {"00000001", "00000002", "best", "latest"}


def test_a_damaged_best_adapter_is_replaced_by_the_one_that_was_measured(copies, capsys):
    run, _ = copies
    directory = RunDirectory(run)
    facts = Checkpoints(directory.checkpoints).newest().facts["measured"]["best"]
    directory.best.write_bytes(directory.best.read_bytes()[:-7])
    tp.run(resume=run)
    best = tp.AdapterContainer.from_directory(directory.best)
    rewards = {int(row.get("version", 0)): row["eval/reward"] for row in rows_of(run)}
    assert facts["version"] <= best.version <= 3 and rewards


@pytest.mark.slow
def test_only_the_last_evaluated_adapters_and_the_best_are_kept(files, tmp_path):
    run = tmp_path / "run"
    config = options_of(files) | {"run": {"steps": 5, "keep_adapters": 2}}
    tp.run(config, output=run)
    directory = RunDirectory(run)
    kept = {int(path.stem) for path in directory.adapters.glob("0*.safetensors")}
    best = tp.AdapterContainer.from_directory(directory.best).version
    assert kept - {best} <= {4, 5} and {4, 5} <= kept


CHDIR = """
import os, tempfile

def reward(completion):
    os.chdir({place!r})
    return float(len(completion))
"""


@pytest.mark.slow
def test_a_reward_that_changes_the_working_directory_moves_no_file(files, tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "reward.py").write_text(CHDIR.format(place=str(elsewhere)))
    shutil.copytree(files / "model", home / "model")
    shutil.copyfile(files / "rows.jsonl", home / "rows.jsonl")
    monkeypatch.chdir(home)
    small = ["--groups-per-step", "2", "--group-size", "2", "--count", "2", "--steps", "2"]
    task = ["--data", "rows.jsonl", "--reward", "reward.py", "--model", "model"]
    assert main(["train", *task, *small, "--max-tokens", "4", "--output", "run"]) == 0
    assert list(elsewhere.iterdir()) == []
    names = {path.name for path in (home / "run").iterdir()}
    assert {"config.toml", "metrics.jsonl", "samples.jsonl", "checkpoints", "report.html"} <= names
    # The config names its files so that the run resumes from any place.
    monkeypatch.chdir(elsewhere)
    assert main(["train", "--resume", str(home / "run"), "--steps", "3"]) == 0


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from textpolicy.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.proves("F11")
@pytest.mark.slow
def test_a_full_disk_exits_75_with_the_line_that_resumes_the_run(copies, attempts):
    run, _ = copies
    adapter = RunDirectory(run).latest.stat().st_size
    before = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    newest = max(before)
    size = len(before[newest])
    # The adapter does not fit; the adapter fits, and the checkpoint does not.
    for limit in (adapter // 2, (adapter + size) // 2):
        full = [sys.executable, "-c", FULL, str(limit), "train", "--resume", str(run)]
        ended = subprocess.run(full, capture_output=True, text=True, check=False, timeout=240)
        assert ended.returncode == 75, ended.stderr
        assert f"resume it with: textpolicy train --resume {run}" in ended.stderr
        assert os.strerror(errno.EFBIG) in ended.stderr
        assert "Traceback" not in ended.stderr
        after = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
        assert after == before
        attempts.add()
    assert "no checkpoint was saved after step 3; earlier checkpoints are unchanged" in ended.stderr
    assert main(["train", "--resume", str(run)]) == 0


HOLD = """
import sys, time
from pathlib import Path
from textpolicy.runs import RunDirectory
with RunDirectory(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(99)
"""


@pytest.mark.slow
@pytest.mark.proves("F18")
def test_a_second_start_is_refused_and_the_lock_of_a_dead_process_is_taken_over(
    copies, attempts, capsys
):
    run, _ = copies
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        for argv in (["--resume", str(run)], ["--resume", str(run), "--force"]):
            assert main(["train", *argv]) == 2
            assert f"process {holder.pid} is writing the run {run}" in capsys.readouterr().err
            attempts.add()
        holder.kill()
    assert main(["train", "--resume", str(run)]) == 0
    attempts.add()


def test_checkpoints_of_a_loop_of_your_own_are_not_resumed_by_the_command(copies, capsys):
    run, _ = copies
    directory = RunDirectory(run)
    checkpoints = Checkpoints(directory.checkpoints)
    newest = checkpoints.newest()
    del newest.facts["run"]
    checkpoints.save(newest)
    with pytest.raises(ConfigError, match="by your own call of train_rl"):
        tp.run(resume=run)


@pytest.mark.slow
def test_two_checkpoints_of_a_supervised_run_are_kept_and_no_validation_is_made_up(
    files, tmp_path, capsys
):
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "data": {"source": str(tmp_path / "rows.jsonl")},
        "trainer": {"iterations": 20},
        "run": {"eval_every": 9, "steps_per_report": 1, "checkpoint_every": 2},
    }
    result = tp.run(config, output=tmp_path / "run", on_event=stop_after(5))
    assert (result.ended, result.after) == ("stopped", None)
    assert result.before is not None and result.best is not None and result.best.step == 0
    directory = RunDirectory(tmp_path / "run")
    assert sorted(path.stem for path in directory.checkpoints.iterdir()) == ["00000004", "00000005"]
    newest = max(directory.checkpoints.iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    directory.metrics.unlink()
    again = tp.run(resume=directory.path)
    assert (again.ended, again.before) == ("finished", result.before)


@pytest.mark.slow
def test_a_page_of_the_user_in_a_run_stays_and_the_run_ends_well(copies, capsys):
    run, _ = copies
    (run / "report.html").write_text("mine")
    assert main(["train", "--resume", str(run)]) == 0
    assert "is not a report that textpolicy wrote" in capsys.readouterr().err
    assert (run / "report.html").read_text() == "mine"
