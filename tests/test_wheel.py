"""What a wheel of TextPolicy contains."""

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTALLED_AS = {"textpolicy": "textpolicy", "envs": "textpolicy_envs"}


@pytest.mark.slow
def test_the_wheel_carries_every_file_of_the_packages(tmp_path: Path) -> None:
    # A build writes files beside the sources, so the test builds from a copy of the sources.
    for folder in INSTALLED_AS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    expected = {
        f"{name}/{path.relative_to(tmp_path / folder).as_posix()}"
        for folder, name in INSTALLED_AS.items()
        for path in (tmp_path / folder).rglob("*.*")
    }
    assert {"textpolicy/tiny/model.safetensors", "textpolicy/py.typed"} <= expected

    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert expected <= set(ZipFile(wheel).namelist())
