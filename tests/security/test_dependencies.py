"""Every dependency has a lowest version, and the versions that were tested are pinned."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_architecture import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line
)
GROUPS = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
REQUIREMENTS = [
    (group, Requirement(text))
    for group, texts in GROUPS.items()
    for text in texts
    if not text.startswith("textpolicy[")
]
# Backends of other machines, and extras that no test of every machine needs. The last two exclude
# each other.
NOT_HERE = {"ray", "cuda12", "cuda13", "trackio", "openenv", "verifiers"}


def of(cases):
    return [pytest.param(*case, id=f"{case[0]} {case[1].name}".strip()) for case in cases]


@pytest.mark.proves("S19")
@pytest.mark.parametrize(("group", "needed"), of(REQUIREMENTS))
def test_a_dependency_has_a_lowest_version_that_the_pinned_one_meets(attempts, group, needed):
    assert any(each.operator in (">=", "==", "~=") for each in needed.specifier), needed
    pins = {canonicalize_name(name): version for name, version in PINNED.items()}
    pinned = pins.get(canonicalize_name(needed.name))
    assert group in NOT_HERE or needed.specifier.contains(pinned), f"{needed} pinned to {pinned}"
    attempts.add()


@pytest.mark.proves("S19")
def test_every_constraint_names_one_version(attempts):
    assert len(PINNED) > 50
    for name, version in PINNED.items():
        assert re.fullmatch(r"[\w.!+-]+", version), f"{name}=={version}"
        attempts.add()
