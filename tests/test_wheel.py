"""What a wheel of TextPolicy contains, and that it works where nothing else of it is."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTALLED_AS = {"textpolicy": "textpolicy", "envs": "textpolicy_envs"}
MOST_BYTES = 5_000_000
# Sources, the loops that are compiled on the machine, the embedded model, reports, new projects.
SUFFIXES = {".py", ".typed", ".md", ".json", ".jinja", ".safetensors", ".toml", ".jsonl", ".txt"}
SUFFIXES |= {".html", ".js", ".css", ".c", ".cpp", ".h"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Return a copy of the sources: a build writes files beside them."""
    folder = tmp_path_factory.mktemp("sources")
    for name in INSTALLED_AS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path) -> Path:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    subprocess.run(build, cwd=sources, check=True, capture_output=True, timeout=120)
    (found,) = (sources / "dist").glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_is_small_and_carries_the_files_of_the_packages_and_no_other(
    sources: Path, wheel: Path
) -> None:
    expected = {
        f"{name}/{path.relative_to(sources / folder).as_posix()}"
        for folder, name in INSTALLED_AS.items()
        for path in (sources / folder).rglob("*.*")
    }
    assert {"textpolicy/tiny/model.safetensors", "textpolicy/py.typed"} <= expected
    files = [file for file in ZipFile(wheel).infolist() if ".dist-info/" not in file.filename]
    assert {file.filename for file in files} == expected
    assert {Path(file.filename).suffix for file in files} == SUFFIXES
    assert wheel.stat().st_size < MOST_BYTES


@pytest.mark.slow
def test_the_demo_and_a_new_project_work_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True, timeout=60)
    python = home / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    subprocess.run([*pip, *install], check=True, timeout=120)
    # The dependencies are those of this environment; its link to our sources is in a .pth file,
    # which Python does not read there.
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*argv: str) -> str:
        command = [home / "bin" / "textpolicy", *argv]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = (
        "import textpolicy, textpolicy_envs; print(textpolicy.__file__, textpolicy_envs.__file__)"
    )
    found = subprocess.run([python, "-I", "-c", where], capture_output=True, text=True, check=True)
    assert found.stdout.count(str(packages)) == 2
    assert "1 steps" in run("demo", "--steps", "1")
    assert "run.toml" in run("init", "mine")
