"""The exit code says whether work had begun, and a mistyped command is answered with a near one."""

import re
import subprocess
import sys

import pytest

from textpolicy.cli import main
from textpolicy.cli.flags import OTHER_WAYS
from textpolicy.cli.parser import EXIT_CODES, build_parser, commands_of

SMALL = ["--env", "add", "--group-size", "2", "--groups-per-step", "2", "--count", "2"]


@pytest.fixture
def rows(tmp_path):
    """Return the path of a file of rows with prompts."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1+1="}\n{"prompt": "2+2="}\n{"prompt": "3+3="}\n')
    return str(path)


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--data", "no/rows.jsonl", "--reward", "no/reward.py"],
        ["train", "--env", "add", "--reward", "no/reward.py"],
        ["train", "--env", "adds"],
        ["train", "--env", "add", "--model", "no-such-model"],
        ["train", "--env", "add", "--adapter", "no/adapter.safetensors"],
        ["train", "--resume", "no/run"],
        ["train", "--config", "no/run.toml"],
        ["sft", "--data", "no/rows.jsonl"],
        ["eval", "--env", "add", "--adapter", "no/adapter.safetensors"],
        ["generate", "--prompt", "x", "--model", "no-such-model"],
        ["check", "no/reward.py", "--env", "add"],
        ["inspect", "no/adapter.safetensors"],
        ["runs", "no/run"],
    ],
    ids=" ".join,
)
def test_whatever_is_named_and_not_there_ends_with_2_and_leaves_nothing(
    argv, failure, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    failure(*argv, code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--env", "add", "--output"],
        ["train", "--resume"],
        ["generate", "--prompt", "x", "--adapter"],
        ["generate", "--prompt", "x", "--model"],
        ["inspect"],
        ["report"],
        ["export", "--to", "mlx", "--output", "folder"],
    ],
    ids=" ".join,
)
def test_a_path_that_the_system_refuses_is_named_with_what_to_do(
    argv, failure, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    message = failure(*argv, 300 * "x", code=2)
    assert "cannot be used: File name too long. Choose another path" in message
    assert list(tmp_path.iterdir()) == []


def test_missing_data_and_a_missing_reward_end_with_the_same_code(failure, rows, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(completion):\n    return 0.0\n")
    failure("train", "--data", rows, "--reward", str(tmp_path / "other.py"), code=2)
    failure("train", "--data", f"{rows}.other", "--reward", str(reward), code=2)


def test_a_failure_after_the_work_has_begun_ends_with_1(failure, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "calls = []\n\n\ndef reward(completion):\n    calls.append(1)\n"
        "    assert len(calls) < 3\n    return 0.0\n"
    )
    argv = ["train", *SMALL, "--reward", str(reward), "--output", str(tmp_path / "run")]
    failure(*argv, code=1)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("trian", "train"), ("evaluate", "eval"), ("reports", "report"), ("--json trian", "train")],
)
def test_a_mistyped_command_is_answered_with_the_nearest_command(typed, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(typed.split())
    assert stopped.value.code == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_a_command_that_is_near_none_is_answered_with_all_of_them(capsys):
    with pytest.raises(SystemExit):
        main(["zzz"])
    error = capsys.readouterr().err
    assert "there is no command 'zzz'; the commands: demo, init, train, sft" in error


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_a_command_of_other_libraries_is_answered_with_ours(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "adapters"])
    error = capsys.readouterr().err
    assert f"there is no command {name!r}; {OTHER_WAYS[name]}" in error
    named = re.search(r"textpolicy (\w+)|--adapter|did you mean (\w+)", OTHER_WAYS[name])
    assert named and set(filter(None, named.groups())) <= set(commands_of(build_parser()))


def test_help_lists_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    assert EXIT_CODES in capsys.readouterr().out
    for code in ("0", "1", "2", "75", "130"):
        assert f"\n  {code} " in f"\n{EXIT_CODES}"


def test_version_names_the_packages_that_compute_and_python(capsys):
    assert main(["--version"]) == 0
    line = capsys.readouterr().out
    python = sys.version.split()[0]
    assert line.startswith("textpolicy ") and "mlx " in line and "mlx-lm " in line
    assert f"Python {python}" in line


def test_version_is_answered_before_anything_else(capsys):
    assert main(["--version", "train"]) == 0
    assert capsys.readouterr().out.startswith("textpolicy ")


@pytest.mark.parametrize(("typed", "shown"), [("help", "exit codes"), ("help train", "--env")])
def test_help_is_a_word_too(typed, shown, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(typed.split())
    assert stopped.value.code == 0 and shown in capsys.readouterr().out


def test_a_value_without_its_flag_is_answered_with_how_options_are_written(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "add"])
    assert stopped.value.code == 2
    assert "train takes no argument 'add'; every option has a name" in capsys.readouterr().err


def test_python_m_textpolicy_is_the_command():
    argv = [sys.executable, "-m", "textpolicy"]
    done = subprocess.run([*argv, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("textpolicy ")
    assert subprocess.run([*argv, "trian"], capture_output=True, check=False).returncode == 2
