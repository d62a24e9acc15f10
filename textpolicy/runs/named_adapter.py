"""How a person names an adapter: by a file, a folder, a run, or a version of a run."""

import re
from dataclasses import dataclass
from pathlib import Path

from textpolicy.adapters.files.adapter_file import peek_version
from textpolicy.errors import ConfigError
from textpolicy.runs.directory import RunDirectory

_VERSION_OF_RUN = re.compile(r"(.+)@(\d{1,12})")
_NAMED = re.compile(r"([\w.@:-]+)=(.+)")


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter on disk, and the name by which people and requests choose it."""

    name: str
    path: Path


def read_named_adapter(text: str) -> NamedAdapter:
    """Return the adapter of NAME=ADAPTER or of ADAPTER alone, as `find_adapter` finds it.

    Without a name, an adapter of a run has the run's name, and any other has its file's name.
    """
    # A path may hold the sign too.
    given = None if Path(text).expanduser().exists() else _NAMED.fullmatch(text)
    name, source = given.groups() if given else (None, text)
    return NamedAdapter(name or _default_name(source), find_adapter(source))


def find_adapter(source: str | Path) -> Path:
    """Return the adapter at a path: a file, a folder of mlx-lm or PEFT, or a run.

    A run gives its adapter with the best held-out score, or its latest one if it measured none
    between its steps. RUN@3 gives the adapter of version 3, if the run has kept it.
    """
    path = Path(source).expanduser()
    if path.exists():
        run = RunDirectory(path)
        return run.chosen_adapter() if run.exists else path
    if version := _VERSION_OF_RUN.fullmatch(str(path)):
        run = RunDirectory(Path(version[1]))
        if run.exists:
            return _adapter_of_version(run, int(version[2]))
    raise ConfigError(
        f"there is no run and no adapter at {path}. Name the folder of a run, a version that it "
        "has kept (RUN@VERSION), an adapter file, or an adapter folder of mlx-lm or PEFT"
    )


def run_of_adapter(path: Path) -> RunDirectory | None:
    """Return the run that is at the path, or that the adapter at the path belongs to."""
    candidates = (RunDirectory(path), RunDirectory(path.absolute().parent.parent))
    return next((directory for directory in candidates if directory.exists), None)


def _adapter_of_version(run: RunDirectory, version: int) -> Path:
    versions = {int(path.stem): path for path in run.kept_adapters()}
    for path in (run.best, run.latest):
        if path.exists():
            versions.setdefault(peek_version(path), path)
    if version not in versions:
        kept = ", ".join(map(str, sorted(versions))) or "none"
        raise ConfigError(
            f"the run {run.path} has no adapter of version {version}; the versions that it has "
            f"kept: {kept}. Name one of these, or the run alone"
        )
    return versions[version]


def _default_name(source: str) -> str:
    path = Path(source).expanduser().absolute()
    if path.suffix != ".safetensors":
        return path.name
    run = RunDirectory(path.parent.parent)
    return f"{run.path.name}/{path.stem}" if run.exists else path.stem
