"""A run writes only into its own folder, privately, and changes no file of anybody else."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import textpolicy as tp
from tests.quick import quick_first
from textpolicy.cli import main
from textpolicy.file_writing import atomic_replace
from textpolicy.runs import RunDirectory
from textpolicy.tracking.report import write_report

SMALL = ["--env", "add", "--groups-per-step", "2", "--group-size", "2", "--count", "2"]
TINY_RUN = ["train", *SMALL, "--steps", "1"]


def contents(folder):
    """Return the type, the mode and the bytes of everything in a folder, without following."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        data = os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        if path.name != ".textpolicy-run":  # It holds the process that looked last.
            found[path.relative_to(folder)] = (status.st_mode, status.st_mtime_ns, data)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the directory of a short run that has ended."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert main([*TINY_RUN, "--output", str(path)]) == 0
    return RunDirectory(path)


FOREIGN = [
    *("config.toml", "report.html", "metrics.jsonl", "samples.jsonl"),
    *("notes.txt", ".git/HEAD", "adapters/latest.safetensors", "checkpoints/a.txt", ".tracking-id"),
]


@pytest.mark.proves("S8", "F12")
@pytest.mark.parametrize("command", quick_first(1, ["train", "sft"]))
def test_a_folder_with_anything_of_the_user_is_refused_and_stays_as_it_is(
    tmp_path, capsys, attempts, command
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{n}", "completion": "b"}}\n' for n in range(20)))
    for name in FOREIGN:
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("[run]\nsteps = 1\n" if name == "config.toml" else "mine")
        before = contents(folder)
        task = [*SMALL, "--steps", "1"] if command == "train" else ["--data", str(rows)]
        given = ["--config", str(folder / name)] if name == "config.toml" == command else []
        assert main([command, *task, *given, "--output", str(folder)]) == 2
        message = capsys.readouterr().err
        named = name.partition("/")[0]
        assert named in message or "holds an earlier run" in message
        assert "--output" in message or "--resume" in message
        assert contents(folder) == before
        attempts.add()


@pytest.mark.proves("S8")
def test_a_config_beside_the_output_is_not_replaced(tmp_path, capsys, attempts):
    config = tmp_path / "config.toml"
    config.write_text("# mine\n[run]\nsteps = 1\n")
    before = contents(tmp_path)
    argv = ["train", *SMALL, "--config", str(config), "--output", str(tmp_path)]
    assert main(argv) == 2
    assert "It holds config.toml" in capsys.readouterr().err
    # Nor does --resume take a folder for a run because of its config, with --force or without.
    for more in ([], ["--force"]):
        assert main(["train", "--resume", str(tmp_path), *more]) == 2
        attempts.add()
    assert "holds no run to resume" in capsys.readouterr().err
    assert contents(tmp_path) == before
    attempts.add()


LINKED = ["metrics.jsonl", "samples.jsonl", "config.toml", "report.html", ".tracking-id"]
LINKED_FOLDERS = ["adapters", "checkpoints", "rejected", "tensorboard", "wandb"]


@pytest.mark.proves("S8")
def test_no_link_in_a_run_is_followed_out_of_it(tmp_path, whole, capsys, attempts):
    for name in (*LINKED, *LINKED_FOLDERS, ".textpolicy-run", ".running"):
        run, outside = tmp_path / "run", tmp_path / "outside"
        subprocess.run(["cp", "-a", str(whole.path), str(run)], check=True)
        (run / name).rename(outside) if (run / name).exists() else outside.mkdir()
        (run / name).symlink_to(outside)
        before = contents(tmp_path)
        options = ["--tensorboard"] if name == "tensorboard" else []
        assert main(["train", "--resume", str(run), *options]) == 2
        message = capsys.readouterr().err
        assert f"{run / name} is a symbolic link" in message
        assert contents(tmp_path) == before
        subprocess.run(["rm", "-r", str(run), str(outside)], check=True)
        attempts.add()


@pytest.mark.parametrize("name", [".textpolicy-run", ".running", "metrics.jsonl", "samples.jsonl"])
def test_a_pipe_in_a_run_is_named_and_keeps_no_report_waiting(tmp_path, whole, capsys, name):
    run = tmp_path / "run"
    subprocess.run(["cp", "-a", str(whole.path), str(run)], check=True)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert main(["train", "--resume", str(run)]) == 2
    assert f"{run / name} is not a file" in capsys.readouterr().err
    if name == "samples.jsonl":
        assert main(["report", str(run)]) == 0


@pytest.mark.proves("S8")
def test_files_that_are_replaced_replace_a_link_and_not_what_it_names(tmp_path, whole, attempts):
    run, secret = tmp_path / "run", tmp_path / "secret.txt"
    subprocess.run(["cp", "-a", str(whole.path), str(run)], check=True)
    secret.write_text("mine")
    directory = RunDirectory(run)
    for path in (directory.report, directory.config, directory.best):
        path.unlink()
        path.symlink_to(secret)
    directory.write_config("[run]\nsteps = 1\n")
    directory.keep_adapter(directory.latest, "best")
    directory.report.unlink()
    directory.report.symlink_to(whole.report)
    before = whole.report.read_bytes(), whole.report.stat().st_mtime_ns
    write_report([run])
    assert secret.read_text() == "mine"
    assert (whole.report.read_bytes(), whole.report.stat().st_mtime_ns) == before
    for path in (directory.report, directory.config, directory.best):
        assert path.is_file() and not path.is_symlink()
        attempts.add()


@pytest.mark.proves("S8")
def test_a_run_folder_behind_a_link_of_the_user_is_that_folder(tmp_path, attempts):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert main([*TINY_RUN, "--output", str(tmp_path / "link" / "run")]) == 0
    assert (tmp_path / "disk" / "run" / "config.toml").is_file()
    attempts.add()


def test_a_page_that_is_no_report_is_not_replaced(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 1.0}\n')
    (tmp_path / "report.html").write_text("mine")
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a report that textpolicy wrote" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "mine"
    (tmp_path / "report.html").unlink()
    for _ in range(2):
        assert main(["report", str(tmp_path)]) == 0


@pytest.mark.slow
@pytest.mark.proves("S16")
@pytest.mark.parametrize("made_before", [False, True])
def test_files_of_a_run_are_private_under_an_open_umask(tmp_path, attempts, made_before):
    pytest.importorskip("tensorboardX")
    run = tmp_path / "run"
    before = os.umask(0)
    try:
        if made_before:
            run.mkdir()
        assert main([*TINY_RUN, "--output", str(run), "--eval-every", "1", "--tensorboard"]) == 0
        write_report([run])
    finally:
        os.umask(before)
    shared = {run} if made_before else set()
    for path in (run, *run.rglob("*")):
        if path.parent.name == "tensorboard":
            continue  # The library's own files, in a folder that only the owner can enter.
        expected = 0o700 if path.is_dir() else 0o600
        assert path in shared or stat.S_IMODE(path.stat().st_mode) == expected, path
        attempts.add()


@pytest.mark.proves("S16")
def test_exported_adapters_follow_the_umask_of_their_owner(tmp_path, whole, attempts):
    model, _ = tp.load_model("tiny")
    container = tp.AdapterContainer.from_directory(whole.latest).load(model)
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    before = os.umask(0)
    try:
        for mask, expected in ((0o022, 0o644), (0o077, 0o600), (0o027, 0o640)):
            os.umask(mask)
            container.publish(folder / "adapters.safetensors")
            mode = (folder / "adapters.safetensors").stat().st_mode
            assert stat.S_IMODE(mode) == expected
            attempts.add()
    finally:
        os.umask(before)


FAILING = """
calls = 0

def reward(completion):
    global calls
    calls += 1
    if calls == 3:
        raise ValueError("no")
    return float(len(completion))
"""


@pytest.mark.slow
@pytest.mark.proves("S14")
def test_no_file_of_a_run_and_no_message_holds_a_secret(tmp_path, monkeypatch, capsys, attempts):
    secrets = {
        name: f"canary-{number}-5fd1c0"
        for number, name in enumerate(
            ["WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "MY_PASSWORD", "AWS_SECRET_ACCESS_KEY"]
        )
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    reward = tmp_path / "reward.py"
    reward.write_text(FAILING)
    run = tmp_path / "run"
    argv = ["train", *SMALL, "--steps", "2", "--reward", str(reward)]
    assert main([*argv, "--on-reward-error", "0", "--output", str(run)]) == 0
    assert main([*argv, "--output", str(tmp_path / "failing")]) == 1
    shown = "".join(capsys.readouterr())
    assert "ValueError: no" in shown
    for value in secrets.values():
        assert value not in shown
        for path in tmp_path.rglob("*"):
            assert path.is_dir() or value.encode() not in path.read_bytes(), path
        attempts.add()


REPORTS = """
import sys
from pathlib import Path
from textpolicy.tracking.report import write_report
for _ in range(20):
    write_report([Path(sys.argv[1])])
"""


@pytest.mark.slow
def test_reports_that_are_written_at_once_do_not_disturb_each_other(tmp_path, whole):
    run = tmp_path / "run"
    subprocess.run(["cp", "-a", str(whole.path), str(run)], check=True)
    writers = [
        subprocess.Popen([sys.executable, "-c", REPORTS, str(run)], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [writer.communicate()[1] for writer in writers] == [b"", b""]
    assert Path(run / "report.html").read_text().endswith("</html>\n")
    assert not list(run.glob(".*partial*"))


@pytest.mark.skipif(sys.platform != "linux", reason="to ask for the umask sets it elsewhere")
def test_writing_a_file_changes_the_umask_of_no_other_thread(tmp_path, monkeypatch):
    def fails(mask):
        raise AssertionError("the umask of the process was changed")

    tmp_path.chmod(0o755)
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", fails)
            with atomic_replace(tmp_path / "a") as temporary:
                temporary.write_text("a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
