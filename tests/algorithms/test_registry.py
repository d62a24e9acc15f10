"""Algorithms by the names of their files, functions by name in options, and files of the user."""

import ast
import re
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

from tests.batches import random_case
from textpolicy import algorithms
from textpolicy.algorithms import grpo
from textpolicy.algorithms.parts import averages, kl, ratio_levels, token_weights
from textpolicy.algorithms.parts.function_options import NAMED_FUNCTIONS, SYNONYMS
from textpolicy.config import ALGORITHMS, TrainConfig, settings_of
from textpolicy.errors import ConfigError

PACKAGE = Path(algorithms.__file__).parents[1]


def names_written_in(text: str) -> list[set[str]]:
    """Return the algorithm names of each list, tuple, set, dict and call that has three or more."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict | ast.Call):
            children = ast.walk(node)
            words = {child.value for child in children if isinstance(child, ast.Constant)}
            words |= {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
            found.append(words & set(ALGORITHMS))
    return [names for names in found if len(names) >= 3]


def test_the_names_are_those_of_the_files():
    files = {path.stem for path in (PACKAGE / "algorithms").glob("*.py")} - {"__init__"}
    assert set(ALGORITHMS) == set(algorithms.names()) == files


@pytest.mark.slow
def test_the_names_are_written_nowhere_else():
    listed = {
        str(path.relative_to(PACKAGE)): names
        for path in PACKAGE.rglob("*.py")
        if (names := names_written_in(path.read_text("utf-8")))
    }
    assert not listed


def test_a_list_of_names_is_noticed():
    assert names_written_in('KNOWN = ("grpo", "dapo", "rloo")')
    assert names_written_in("KNOWN = {'grpo': 1, 'dapo': 2, 'rloo': 3}")
    assert names_written_in("known(grpo, dapo, rloo)")
    assert not names_written_in('FEW = ("grpo", "dapo")')


def test_each_file_has_two_functions_and_a_declaration():
    for name in algorithms.names():
        algorithm = algorithms.get(name)
        assert algorithm.declaration.paper, name
        assert callable(algorithm.compute_advantages) and callable(algorithm.policy_loss)


def test_names_lead_to_functions_with_options_bound():
    dapo = algorithms.get("dapo", clip_high=0.4, eps=0.0)
    assert dapo.declaration.dynamic_sampling
    assert dapo.compute_advantages(mx.array([1.0, 0, 0, 0])).tolist() == [1.5, -0.5, -0.5, -0.5]
    logp, batch = random_case()
    wide = algorithms.get("dapo").policy_loss(logp, batch, clip_high=0.4)[0]
    assert dapo.policy_loss(logp, batch)[0].item() == wide.item()


def test_an_unknown_name_or_option_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"no algorithm is called 'dappo'.*mean 'dapo'"):
        algorithms.get("dappo")
    with pytest.raises(ConfigError, match=r"no option 'clip_hihg'.*mean 'clip_high'"):
        algorithms.get("dapo", clip_hihg=0.3)


@pytest.mark.parametrize(
    ("named", "given"),
    [
        ({"average": "token_mean"}, {"average": averages.token_mean}),
        ({"average": "constant(tokens=7)"}, {"average": partial(averages.constant, tokens=7)}),
        ({"ratio_level": "sequence"}, {"ratio_level": ratio_levels.SEQUENCE}),
        ({"kl": "k2", "beta": 0.2}, {"kl": kl.k2, "beta": 0.2}),
        ({"weights": ["truncate_tokens"]}, {"weights": [token_weights.truncate_tokens]}),
        (
            {"weights": "mask_tokens(low=0.9, high=1.05)"},
            {"weights": [partial(token_weights.mask_tokens, low=0.9, high=1.05)]},
        ),
    ],
)
def test_a_name_is_as_good_as_its_function(named, given):
    logp, batch = random_case()
    loss = algorithms.get("grpo", **named).policy_loss(logp, batch)[0]
    assert loss.item() == algorithms.get("grpo", **given).policy_loss(logp, batch)[0].item()
    assert loss.item() != grpo.policy_loss(logp, batch)[0].item()


def test_the_correction_of_vespo_has_names_too():
    logp, batch = random_case()
    named = algorithms.get("vespo", correction="truncate_tokens(cap=1.01)").policy_loss
    given = algorithms.get(
        "vespo", correction=partial(token_weights.truncate_tokens, cap=1.01)
    ).policy_loss
    assert named(logp, batch)[0].item() == given(logp, batch)[0].item()


@pytest.mark.parametrize(("synonym", "name"), SYNONYMS.items())
def test_names_of_papers_are_known(synonym, name):
    (weight,) = algorithms.get("grpo", weights=[synonym.upper()]).policy_loss.keywords["weights"]
    assert weight is NAMED_FUNCTIONS["weights"][name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"average": "sequence_maen"},
            r"average is 'sequence_maen'; known: .*mean 'sequence_mean'",
        ),
        ({"ratio_level": "answer"}, r"'answer'; known: token, sequence, whole_sequence"),
        ({"kl": "k9"}, r"kl is 'k9'; known: k1, k2, k3, unbiased_k3"),
        ({"weights": ["truncate"]}, r"weights is 'truncate'; known: truncate_tokens, "),
        (
            {"average": "constant"},
            r"missing a required.* 'tokens'.*constant takes tokens; write constant\(tokens=2.0\)",
        ),
        ({"weights": ["tis(capp=3)"]}, r"unexpected.* 'capp'.*truncate_tokens takes cap;"),
        ({"weights": ["tis(cap='x')"]}, r"expected a name, with numbers in brackets"),
        ({"weights": ["tis(3)"]}, r"expected a name, with numbers in brackets"),
        ({"kl": "k2(x=1)"}, r"unexpected.* 'x'.*k2 takes no numbers"),
    ],
)
def test_a_wrong_name_of_a_function_is_answered_with_the_known_ones(options, message):
    with pytest.raises(ConfigError, match=message):
        algorithms.get("grpo", **options)


def test_the_help_of_each_setting_names_all_its_functions():
    helps = {setting.key: setting.option.help for setting in settings_of(TrainConfig())}
    for option in ("average", "ratio_level", "kl", "weights"):
        for name in NAMED_FUNCTIONS[option]:
            assert re.search(rf"\b{name}\b", helps[f"algorithm.{option}"]), (option, name)


def write(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text("import mlx.core as mx\n" + text)
    return str(path)


RANKS = """
def compute_advantages(rewards, *, spread=1.0):
    order = mx.argsort(mx.argsort(rewards, axis=-1), axis=-1)
    return spread * (order / (rewards.shape[-1] - 1) - 0.5)
"""
LINEAR = """
def policy_loss(logp, batch, scale=1.0):
    loss = -mx.where(batch.mask, batch.advantages * logp, 0).sum() / batch.token_count
    return scale * loss, {}
"""


def test_a_file_with_advantages_has_grpo_s_loss(tmp_path):
    mine = algorithms.get(write(tmp_path, RANKS), spread=4.0, clip_high=0.3)
    assert mine.compute_advantages(mx.array([[0.0, 5.0, 1.0]])).tolist() == [[-2, 2, 0]]
    assert mine.policy_loss.func is grpo.policy_loss
    assert mine.policy_loss.keywords == {"clip_high": 0.3}
    assert mine.trainer == {"skip_without_advantages": True}


def test_a_file_with_a_loss_has_grpo_s_advantages(tmp_path):
    mine = algorithms.get(write(tmp_path, LINEAR), scale=2.0)
    logp, batch = random_case()
    expected = -(mx.where(batch.mask, batch.advantages * logp, 0).sum() / batch.token_count)
    assert mine.policy_loss(logp, batch)[0].item() == pytest.approx(2 * expected.item())
    assert mine.compute_advantages is grpo.compute_advantages
    assert mine.trainer == {"skip_without_advantages": False}, "nothing is declared"


def test_a_file_can_declare_what_its_functions_cannot_say(tmp_path):
    declared = """
from textpolicy.algorithms import Declaration
DECLARATION = Declaration(needs_advantages=True, trainer={"epochs": 2})
"""
    mine = algorithms.get(write(tmp_path, RANKS + LINEAR + declared))
    assert mine.trainer == {"skip_without_advantages": True, "epochs": 2}


def test_a_function_of_a_file_is_named_and_takes_the_place_that_its_arguments_say(tmp_path):
    renamed = RANKS.replace("compute_advantages(rewards,", "ranks(rewards, lengths,")
    file = write(tmp_path, renamed + LINEAR.replace("policy_loss", "linear"))
    ranks, linear = algorithms.get(f"{file}:ranks"), algorithms.get(f"{file}:linear")
    assert ranks.compute_advantages.__name__ == "ranks"
    assert ranks.policy_loss is grpo.policy_loss
    assert linear.policy_loss.__name__ == "linear"
    assert linear.compute_advantages is grpo.compute_advantages


@pytest.mark.parametrize(
    ("text", "spec", "options", "message"),
    [
        ("def ranks(rewards): ...", "", {}, r"neither compute_advantages.*functions: ranks"),
        ("x = 1", "", {}, r"neither .*functions: none"),
        ("def ranks(rewards): ...", ":rnaks", {}, r"no function 'rnaks'.*mean 'ranks'"),
        (RANKS, "", {"spraed": 1}, r"mine.py has no option 'spraed'.*mean 'spread'"),
        (LINEAR.replace("scale=1.0", "*, scale"), "", {}, r"cannot be called.*argument: 'scale'"),
        ("1 / 0", "", {}, r"importing .*mine.py raised ZeroDivisionError.*line 2"),
    ],
)
def test_the_error_says_what_a_file_lacks(tmp_path, text, spec, options, message):
    with pytest.raises(ConfigError, match=message):
        algorithms.get(write(tmp_path, text) + spec, **options)


def test_a_file_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"algorithm file 'no_such.py' does not exist"):
        algorithms.get("no_such.py")
