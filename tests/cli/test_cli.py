"""The command as people and scripts meet it: answers, exit codes, and one message for a mistake."""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from textpolicy.cli import main
from textpolicy.cli.flags import FLAGS_OF_OTHER_LIBRARIES
from textpolicy.cli.parser import build_parser, commands_of
from textpolicy.config import SFTConfig, TrainConfig, read_toml, settings_of
from textpolicy.config.toml import NAMES_IN_OTHER_LIBRARIES, WAYS_BESIDE_SETTINGS, suggestion_for

SMALL_RUN = ["--env", "add", "--group-size", "4", "--groups-per-step", "2", "--count", "4"]
REWARDS = """
def checksum(prompt, completion, example):
    return sum(map(ord, completion)) % 10 / 10

def praise(prompt, completion, example):
    return "good"

def decline(prompt, completion, example):
    return None

def interrupt(prompt, completion, example):
    raise KeyboardInterrupt

def flat(prompt, completion, example):
    return 0.5

calls = 0

def break_early(prompt, completion, example):
    global calls
    calls += 1
    if calls > 5:
        raise ValueError("in the first step")
    return 0.5
"""


@pytest.fixture
def rewards(tmp_path):
    """Return a function that returns the --reward option for the name of a reward."""
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS)
    return lambda name: f"{path}:{name}"


def subcommands() -> dict[str, argparse.ArgumentParser]:
    return commands_of(build_parser())


COMMANDS = [*subcommands()]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_with_its_default_and_ends_in_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    examples = capsys.readouterr().out.partition("\nexample")[2]
    assert examples.splitlines()[0] in (":", "s:") and "  textpolicy" in examples
    for action in subcommands()[name]._actions:
        assert action.help
        flag = action.nargs == 0
        assert flag or action.required or "default" in action.help or "instead of" in action.help


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_in_the_help_are_valid_commands(name):
    for line in subcommands()[name].epilog.splitlines()[1:]:
        program, *example = shlex.split(line)
        assert program == "textpolicy"
        assert build_parser().parse_args(example).command == name


@pytest.mark.parametrize(
    "argv",
    [
        ["dance"],
        ["train", "--env", "add", "--output", "x", "--speed", "9"],
        ["train", "--env", "add", "--output", "x", "--steps", "0"],
        ["train", "--env", "add", "--output", "x", "--group-size", "1"],
        ["train", "--env", "add", "--output", "x", "--lr", "fast"],
        ["train", "--env", "add", "--output", "x", "--lr", "0"],
        ["train", "--env", "add", "--output", "x", "--lr", "inf"],
        ["train", "--env", "add", "--output", "x", "--scale", "0"],
        ["train", "--env", "add", "--output", "x", "--temperature", "0"],
        ["train", "--env", "add", "--output", "x", "--temperature", "nan"],
        ["generate", "--prompt", "x", "-n", "0"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_exit_with_2_and_print_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: textpolicy") and "error: " in error


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_error_about_a_mistyped_flag_names_the_nearest_flag(command, capsys):
    for action in subcommands()[command]._actions:
        for flag in (flag for flag in action.option_strings if len(flag) > 5):
            mistyped = f"{flag[:3]}{flag[4:]}"
            with pytest.raises(SystemExit) as stopped:
                main([command, f"{mistyped}=1"])
            assert stopped.value.code == 2
            shown = capsys.readouterr().err
            assert shown.startswith(f"usage: textpolicy {command}")
            assert f"unknown flag {mistyped}; did you mean --" in shown


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lerning-rate", "; did you mean --lr?"),
        ("-lr", "; did you mean --lr?"),
        ("--num_generations", "; did you mean --group-size?"),
        ("--groupsize", "; did you mean --group-size?"),
        ("--fp16", "; did you mean --dtype float16?"),
        ("--num-train-epochs", "; did you mean --steps?"),
        (
            "--gradient-accumulation-steps",
            "; rollout.groups_per_step (--groups-per-step) is per_device_train_batch_size times ",
        ),
        ("--loss-type", "; did you mean --algorithm?"),
        ("--save-steps", "; did you mean --checkpoint-every?"),
        ("--reward-weights", "; the weights are in the file of the reward"),
        ("--xyzzy", "; --help lists them"),
    ],
)
def test_the_error_about_a_flag_of_another_library_names_our_flag(flag, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--env", "add", flag, "1"])
    assert stopped.value.code == 2
    assert f"unknown flag {flag}{meant}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "train", "sft"),
    [
        ("gradient_accumulation_steps", None, "--accumulation"),
        ("per_device_train_batch_size", None, "--batch-size"),
        ("num_train_epochs", "--steps", "--epochs"),
        ("max_steps", "--steps", "--iterations"),
        ("steps_per_eval", "--eval-every", "--eval-every"),
        ("save_every", "--checkpoint-every", "--checkpoint-every"),
        ("logging_steps", None, "--steps-per-report"),
    ],
)
def test_a_name_of_another_library_means_the_option_that_the_command_has(name, train, sft):
    commands = subcommands()
    for command, ours in (("train", train), ("sft", sft)):
        hint = commands[command]._suggestion(f"--{name}")
        assert hint == (f"; did you mean {ours}?" if ours else f"; {WAYS_BESIDE_SETTINGS[name]}")
    for config, ours in ((TrainConfig(), train), (SFTConfig(), sft)):
        keys = {setting.flag: setting.key for setting in settings_of(config)}
        hint = suggestion_for(f"trainer.{name}", list(keys.values()))
        way = WAYS_BESIDE_SETTINGS.get(name)
        assert hint == (f"; did you mean {keys[ours]}?" if ours else f"; {way}")


def test_no_name_of_another_library_is_a_flag_of_ours_and_each_stands_for_one():
    commands = subcommands()
    flags = {*commands["train"]._option_string_actions, *commands["sft"]._option_string_actions}
    keys = {one.key for config in (TrainConfig(), SFTConfig()) for one in settings_of(config)}
    known = keys | {key.rpartition(".")[2] for key in keys}
    for name, ours in NAMES_IN_OTHER_LIBRARIES.items():
        assert f"--{name.replace('_', '-')}" not in flags and {*ours} <= known
    assert not FLAGS_OF_OTHER_LIBRARIES.keys() & flags
    assert {ours.split()[0] for ours in FLAGS_OF_OTHER_LIBRARIES.values()} <= flags


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["generate", "--prompt", "--is this a flag?"], "prompt", "--is this a flag?"),
        (["generate", "--prompt=--odd"], "prompt", "--odd"),
        (["generate", "--prompt", "x", "-n3"], "n", 3),
        (["train", "--on-reward-error", "-1"], "task.on_reward_error", -1),
        (["runs", "--", "--odd"], "paths", [Path("--odd")]),
    ],
)
def test_values_that_look_like_flags_are_values(argv, name, value):
    assert vars(build_parser(argv[0]).parse_args(argv))[name] == value


@pytest.mark.parametrize("option", ["--lr", "--temperature"])
def test_a_setting_with_which_nothing_can_be_learned_is_refused_before_the_run(
    option, tmp_path, capsys
):
    with pytest.raises(SystemExit):
        main(["train", "--env", "add", "--output", str(tmp_path / "run"), option, "0"])
    assert f"{option}: '0'; expected a number above 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_imports_none_of_the_heavy_libraries():
    program = (
        "import sys; from textpolicy.cli.parser import build_parser; build_parser();"
        "sys.exit(any(name in sys.modules for name in ('mlx_lm', 'transformers', 'wandb')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


COMMAND = "from textpolicy.cli import main; raise SystemExit(main())"


@pytest.fixture
def without_backend(tmp_path):
    """Return a function that runs a program where mlx has no backend."""
    # A package whose `core` fails is what `pip install mlx` leaves on Linux.
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()

    def run(program: str, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, *argv],
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_without_a_backend_of_mlx_one_line_says_what_to_install(without_backend):
    done = without_backend(COMMAND, "doctor")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "pip install" in line and "textpolicy" in line


def test_without_a_backend_of_mlx_help_still_works(without_backend):
    done = without_backend(COMMAND, "train", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--group-size" in done.stdout


@pytest.mark.parametrize(
    "use",
    [
        "import textpolicy as tp; tp.load_model('tiny')",
        "import textpolicy as tp; tp.Task",
        "from textpolicy import Task",
        "from textpolicy import AdapterContainer",
        "from textpolicy import train_rl",
    ],
)
def test_without_a_backend_of_mlx_the_first_use_of_the_library_says_what_to_install(
    use, without_backend
):
    done = without_backend(f"try:\n    {use}\nexcept ImportError as error:\n    print(error)")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith("mlx has no backend here") and "pip install" in line


def test_doctor_reports_versions_device_and_blas(answer, capsys):
    report = answer("doctor")
    assert report["usable"] and report["tiny_model"]
    assert report["mlx"] and report["mlx-lm"] and report["python"]
    assert report["device"] in ("cpu", "gpu")
    assert report["blas"]["gflops"] > 0
    assert report["memory_bytes"] > 2**28
    if threads := report["threads"]:
        assert 1 <= threads["of_a_run"] <= os.cpu_count()
        assert threads["gflops"] > 0 and threads["gflops_of_one"] > 0
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "GFLOP/s" in printed
    # The last line is what to type next.
    assert printed.splitlines()[-1].split() == ["next", *report["next"].split()]
    assert report["next"] == "textpolicy demo"


def test_greedy_answers_of_generate_are_the_same_each_time(answer, capsys):
    argv = ["generate", "--prompt", "347+185=", "--temperature", "0"]
    (completion,) = answer(*argv)["completions"]
    assert len(completion["tokens"]) == len(completion["logprobs"])
    assert main(argv) == 0
    assert capsys.readouterr().out == completion["text"] + "\n"


def test_generate_repeats_a_sample_by_its_seed(answer):
    def texts(seed: str) -> list[str]:
        argv = ["generate", "--prompt", "make 13 from 2 3 5", "-n", "8", "--seed", seed]
        return [completion["text"] for completion in answer(*argv)["completions"]]

    assert len(texts("1")) == 8
    assert texts("1") == texts("1") != texts("2")


def test_generate_stops_at_a_stop_string_and_at_max_tokens(answer):
    argv = ["generate", "--prompt", "347+185=", "--temperature", "0"]
    (whole,) = answer(*argv)["completions"]
    (cut,) = answer(*argv, "--max-tokens", "1")["completions"]
    assert cut["tokens"] == whole["tokens"][:1] and cut["stop_reason"] == "length"
    (stopped,) = answer(*argv, "--stop", whole["text"][:2])["completions"]
    assert stopped["tokens"] == whole["tokens"][:2] and stopped["stop_reason"] == "stop_string"


def test_train_writes_adapters_config_and_one_line_of_metrics_for_each_step(answer, tmp_path):
    output = tmp_path / "run"
    report = answer("train", *SMALL_RUN, "--steps", "2", "--rank", "4", "--output", str(output))
    assert report["steps"] == 2 and report["adapters"] == str(
        output / "adapters" / "latest.safetensors"
    )
    assert 0 <= report["before"]["reward"] <= 1 and report["after"]["count"] == 4
    assert read_toml(output / "config.toml", TrainConfig()).adapter.rank == 4
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert all("reward" in line and "tokens_per_second" in line for line in metrics[:2])
    assert ["eval/reward" in line for line in metrics] == [True, False, True]
    assert metrics[0]["eval/reward"] == report["before"]["reward"]
    assert metrics[2]["eval/reward"] == report["after"]["reward"]


@pytest.mark.slow
def test_a_seed_makes_a_run_repeatable(answer, tmp_path, rewards):
    def adapters(name: str, seed: str) -> bytes:
        argv = [
            "train",
            *SMALL_RUN,
            "--reward",
            rewards("checksum"),
            "--steps",
            "2",
            "--seed",
            seed,
        ]
        answer(*argv, "--steps", "2", "--output", str(tmp_path / name))
        return (tmp_path / name / "adapters" / "latest.safetensors").read_bytes()

    assert adapters("a", "1") == adapters("b", "1")
    assert adapters("a2", "1") != adapters("c", "2")


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [[], ["--quantize", "4"]], ids=["float", "4-bit"])
def test_eval_compares_trained_adapters_with_their_base(
    quantize, answer, tmp_path, rewards, capsys
):
    argv = ["train", *SMALL_RUN, "--reward", rewards("checksum"), "--steps", "3", "--lr", "0.01"]
    trained = answer(*argv, *quantize, "--output", str(tmp_path / "run"))
    argv = ["eval", "--env", "add", "--reward", rewards("checksum"), "--count", "4"]
    argv += ["--adapter", str(tmp_path / "run" / "adapters" / "latest.safetensors")]
    report = answer(*argv)
    assert report["base"] == pytest.approx(trained["before"])
    assert report["adapter"] == pytest.approx(trained["after"])
    gain = trained["after"]["reward"] - trained["before"]["reward"]
    assert report["comparison"]["gain"] == pytest.approx(gain)
    assert main([*argv, "--eval-samples", "2", "--show", "1"]) == 0
    shown = capsys.readouterr().out
    assert "95 % interval" in shown and "paired bootstrap" in shown and "pass@2" in shown
    differing = report["comparison"]["differences"]
    assert shown.count("prompt  ") == min(1, len(differing))
    if differing:
        assert differing[0]["prompt"] in shown and differing[0]["after"] in shown


def test_eval_without_adapters_scores_the_base(answer):
    report = answer("eval", "--env", "reverse", "--count", "8")
    assert report["base"]["count"] == 8
    assert "adapter" not in report


@pytest.mark.slow
def test_demo_ends_with_one_line_of_four_numbers(answer):
    report = answer("demo", "--steps", "1")
    assert list(report) == ["before", "after", "seconds", "steps"]
    assert 0 < report["before"] < 1 and report["steps"] == 1 and report["seconds"] > 0


def test_progress_goes_to_stderr_and_answers_to_stdout(tmp_path, capsys):
    assert main(["train", *SMALL_RUN, "--steps", "1", "--output", str(tmp_path / "run")]) == 0
    stdout, stderr = capsys.readouterr()
    assert "step 1/1" in stderr
    assert "before" in stdout and "step 1/1" not in stdout


def test_the_error_about_an_unknown_environment_names_the_known_ones(failure, tmp_path):
    message = failure("train", "--env", "adds", "--output", str(tmp_path / "run"))
    assert "adds" in message and "add" in message and "countdown" in message


def test_the_error_about_an_unknown_model_says_which_names_are_allowed(failure):
    message = failure("eval", "--env", "add", "--model", "no-such-model")
    assert "no-such-model" in message and "tiny" in message


def test_the_error_about_a_missing_reward_file_names_the_file(failure):
    assert "/no/such.py" in failure("eval", "--env", "add", "--reward", "/no/such.py:score", code=2)


def test_the_error_about_a_missing_reward_function_names_the_function(failure, rewards):
    message = failure("eval", "--env", "add", "--reward", rewards("score"), code=2)
    assert "score" in message and "my_rewards.py" in message


@pytest.mark.parametrize("command", [["eval"], ["train", "--output", "run"]], ids=lambda c: c[0])
def test_a_reward_that_returns_a_string_is_shown_with_it(
    command, failure, rewards, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    argv = ["--env", "add", "--reward", rewards("praise"), "--model", "no-such-model"]
    message = failure(*command, *argv)
    assert "praise returned 'good'" in message
    assert "no-such-model" not in message  # it was told before a model was looked for


def test_a_reward_that_never_scores_is_an_error_and_not_a_zero(failure, rewards):
    argv = ["eval", "--env", "add", "--reward", rewards("decline"), "--count", "4"]
    assert "returned None for each of 4 held-out completions" in failure(*argv)


def test_the_error_about_a_missing_adapter_file_names_the_file(failure):
    assert "/no/a.safetensors" in failure(
        "generate", "--prompt", "x", "--adapter", "/no/a.safetensors"
    )


def test_an_unwritable_output_path_is_an_error_before_the_model_is_loaded(failure, tiny, tmp_path):
    (tmp_path / "file").touch()
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    output, model = str(tmp_path / "file" / "run"), str(tmp_path / "model")
    message = failure("train", *SMALL_RUN, "--output", output, "--model", model, code=2)
    assert output in message and "cannot load the model" not in message


def test_an_output_folder_with_an_earlier_run_is_not_changed(failure, tmp_path):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "latest.safetensors").write_text("precious")
    message = failure("train", *SMALL_RUN, "--output", str(tmp_path), code=2)
    assert "earlier run" in message
    assert (tmp_path / "adapters" / "latest.safetensors").read_text() == "precious"


@pytest.mark.slow
def test_a_run_that_fails_before_its_first_update_leaves_its_folder_usable(
    failure, answer, rewards, tmp_path
):
    argv = ["train", *SMALL_RUN, "--steps", "1", "--output", str(tmp_path / "run")]
    # One call checks the reward, four measure "before", the sixth is in the first step.
    assert "in the first step" in failure(*argv, "--reward", rewards("break_early"))
    assert not (tmp_path / "run" / "adapters" / "latest.safetensors").exists()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    assert answer(*argv, "--reward", rewards("checksum"))["updates"] == 1
    first, last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert '"reward"' in first and '"eval/reward"' in last


@pytest.mark.slow
def test_a_run_without_any_signal_says_so_and_leaves_adapters_that_change_nothing(
    answer, rewards, tmp_path, capsys
):
    argv = ["train", *SMALL_RUN, "--steps", "2", "--reward", rewards("flat")]
    assert main([*argv, "--output", str(tmp_path / "run")]) == 0
    assert "No update was made" in capsys.readouterr().out
    adapter = str(tmp_path / "run" / "adapters" / "latest.safetensors")
    task = ["--env", "add", "--count", "4", "--reward", rewards("checksum")]
    report = answer("eval", *task, "--adapter", adapter)
    assert report["adapter"] == report["base"]


def test_an_interrupted_run_exits_with_130(rewards, capsys):
    argv = ["eval", "--env", "add", "--reward", rewards("interrupt"), "--count", "4"]
    assert main(argv) == 130
    assert "Traceback" not in capsys.readouterr().err
