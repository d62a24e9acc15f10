"""The examples run as a reader would run them."""

import runpy
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.judge_server import judge_server
from textpolicy.environments import load
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.rewards import load_reward, score
from textpolicy.rollout.worker import collect

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


NUMBERED = {
    "1_train_with_lora.py": (["1"], ["step 0: sampled with version 0", "merged model: 2+5=7"]),
    "2_swap_adapters.py": (
        [],
        [
            "off is the base: True",
            "unloaded is the base: True",
            "a dora layer, fused Linear(input_dims=192",
            "fused: 100.0% of the update is in the weights, equal: True",
        ],
    ),
    "3_supervised_training.py": (
        ["10"],
        ["iteration 0: validation loss", "iteration 10: saved adapter", "all validation data"],
    ),
    "4_instructions_to_merged_model.py": (
        ["1"],
        [
            "21 demonstrations to train on, 3 to validate",
            "['adapter_config.json', 'adapter_model.safetensors']",
            "the merged model answers",
        ],
    ),
    "5_qlora_by_rules.py": (
        [],
        [
            "linear1  Linear  64 x 16  lora     16    0.03125  nf4 / channel",
            "linear1.base.scales: (64, 1), mlx.core.float32",
            "8 adapted layers over a frozen base of 4 bits",
        ],
    ),
}
TOUR = {
    "tour/1_your_first_reward.py": (
        ["1"],
        ["gold highest   ok", "step 1/1: reward", "held-out reward", '"completion"'],
    ),
    "tour/2_your_own_rows.py": (
        ["1"],
        ["900 rows to train on, 100 held out", "held-out reward"],
    ),
    "tour/3_several_turns_with_a_tool.py": (
        ["1"],
        ["with mul(a,b) ['mul(", "held-out reward"],
    ),
    "tour/4_sft_then_rl.py": (
        ["4", "1"],
        ["validation loss", "after imitation"],
    ),
    "tour/5_a_judge.py": (["1"], ["step 1/1: reward", '"clear"', '"brief"']),
    "tour/6_serve.py": ([], ["base answers '", "trained answers '"]),
    "tour/7_compare_runs.py": (["1"], ["gain ", "tasks better", "curves of both runs"]),
}


def test_every_numbered_example_is_tested_and_fits_a_screen():
    numbered = sorted([*EXAMPLES.glob("[0-9]*.py"), *EXAMPLES.glob("tour/*.py")])
    assert [str(path.relative_to(EXAMPLES)) for path in numbered] == sorted(NUMBERED | TOUR)
    assert all(len(path.read_text().splitlines()) <= 60 for path in numbered)


@pytest.mark.parametrize("name", NUMBERED)
def test_a_numbered_example_runs_and_prints_what_it_is_about(name, capsys, monkeypatch):
    run_example(name, *NUMBERED[name], capsys, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOUR)
def test_an_example_of_the_tour_runs_and_prints_what_it_is_about(name, capsys, monkeypatch):
    with judge_server() as url:
        monkeypatch.setenv("JUDGE_URL", url)
        run_example(name, *TOUR[name], capsys, monkeypatch)


def run_example(name, arguments, expected, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    missing = [text for text in expected if text not in printed]
    assert not missing, printed


@pytest.mark.slow
def test_the_circle_example_reloads_each_new_version():
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "circle.py", "2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "next samples use version 2" in done.stdout


def test_the_example_rewards_load_and_score():
    close = load_reward(f"{EXAMPLES}/my_reward.py:close")
    example = {"sum": 532}
    scores = [score(close, "347+185=", text, example) for text in ("532", "531", "5", "cat", "")]
    assert scores == sorted(scores, reverse=True)
    assert (scores[0], scores[-1]) == (1.0, 0.0)
    only_even = load_reward(f"{EXAMPLES}/my_reward.py:only_even_sums")
    assert score(only_even, "347+185=", "532", example) == 1.0
    assert score(only_even, "347+186=", "533", {"sum": 533}) is None
    both = load_reward(f"{EXAMPLES}/my_reward.py:both")
    assert score(both, "347+185=", "532", example) == 1 + 0.1 / 4
    assert score(load_reward(f"{EXAMPLES}/my_reward.py:unlike_the_others"), "p", "c", {}) == 1.0


def test_the_agent_reads_and_samples_what_the_environment_with_its_tools_does(load_tiny):
    call = runpy.run_path(str(EXAMPLES / "my_agent.py"))["call"]
    assert (call("mul(47,83)"), call(" sub(1, -2) ")) == ("3901", "3")
    assert not any(map(call, ["mul(47)", "7", "mul(4,8-)", "div(4,8)", "mul(4,8,2)", "("]))
    agent, built_in = load(f"agent:{EXAMPLES / 'my_agent.py'}"), load("calculator")
    policy = create_policy(*load_tiny(), {"max_tokens": 14, "temperature": 0.0})
    tasks = built_in.heldout(3)
    with closing(agent):
        played, expected = (
            collect(some, policy, environment.reward, group_size=1, seed=0)
            for environment, some in (
                (agent, [replace(task, env=None, agent=agent.agent) for task in tasks]),
                (built_in, tasks),
            )
        )
    for one, other in zip(played, expected, strict=True):
        assert one.rollouts[0].tokens == other.rollouts[0].tokens
        assert one.rollouts[0].mask == other.rollouts[0].mask
        assert one.rollouts[0].reward == other.rollouts[0].reward
