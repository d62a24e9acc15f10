"""An export that is killed at any instant leaves the earlier export, or none, or the new one."""

import json
import os
import signal
from itertools import count

import pytest

import textpolicy as tp
from tests.faults.killable_runs import Instant, exit_code_of, start_command
from textpolicy.file_writing import replace_folder

# The first file that is renamed is the model card.
INSTANTS = {
    "before anything is written": ("unfinished", 1),
    "while the weights are written": ("index.json", 1),
    "while the result is opened again": ("unfinished/config.json", 2),
    "before the mark is written": ("unfinished/export.json", 1),
    "before the earlier export moves": ("os.rename", 2),
    "before the new export moves": ("os.rename", 3),
    "before the earlier export is removed": ("shutil.rmtree", 1),
}


def state_of(folder):
    """Return the format of the whole export in a folder, or None without a folder."""
    if not folder.exists():
        return None
    facts = json.loads((folder / "export.json").read_text())
    assert set(facts["files"]) == set(os.listdir(folder)), "a part of an export"
    return facts["format"]


@pytest.mark.slow
@pytest.mark.parametrize("instant", INSTANTS)
def test_a_killed_export_leaves_a_whole_export_or_none(instant, trained, tmp_path):
    path, folder = trained(None, 0.05), tmp_path / "out"
    tp.export_adapter(path, "peft", folder, model="tiny")
    deed, number = INSTANTS[instant]
    process, _ = start_command(
        [
            *("export", path, "--model", "tiny", "--to", "mlx", "--force"),
            *("--output", str(folder)),
        ],
        tmp_path / "printed.txt",
        Instant(deed, number, signal.SIGKILL),
    )
    printed = (tmp_path / "printed.txt").read_text
    assert exit_code_of(process) == -signal.SIGKILL, printed()
    expected = {"before the new export moves": None, "before the earlier export is removed": "mlx"}
    assert state_of(folder) == expected.get(instant, "peft")
    # The next export removes what the killed one left.
    tp.export_adapter(path, "mlx-lm", folder, model="tiny", force=True)
    assert state_of(folder) == "mlx-lm"
    assert set(os.listdir(tmp_path)) == {"out", "printed.txt"}


def test_an_export_removes_only_what_exports_have_left(trained, tmp_path):
    kept = [".out.unfinished", ".out.1-abc.unfinished.txt", "out.99999999-abc.unfinished"]
    for name in kept:
        (tmp_path / name).mkdir()
    alive = f".out.{os.getpid()}-abc.unfinished"
    (tmp_path / ".out.99999999-abc.unfinished").mkdir()
    (tmp_path / alive).mkdir()
    (tmp_path / ".link.99999999-abc.unfinished").symlink_to(tmp_path / kept[0])
    tp.export_adapter(trained(None, 0.05), "peft", tmp_path / "out", model="tiny")
    left = {*kept, alive, "out", ".link.99999999-abc.unfinished"}
    assert set(os.listdir(tmp_path)) == left


def test_ctrl_c_between_the_two_renames_keeps_the_earlier_folder(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "earlier").touch()
    replace, calls = os.replace, count(1)

    def interrupted(source, destination):
        if next(calls) == 2:
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr("textpolicy.file_writing.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt), replace_folder(target) as folder:
        (folder / "new").touch()
    assert [path.name for path in target.iterdir()] == ["earlier"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
