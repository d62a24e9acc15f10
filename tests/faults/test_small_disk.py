"""A disk that is too small for a checkpoint ends a run with 75, after an alarm, and it resumes."""

import os
import subprocess

import mlx.core as mx
import pytest

from textpolicy.adapters.files.tensor_file import write_tensors
from textpolicy.cli import main
from textpolicy.errors import UnwritableError


@pytest.mark.proves("F11")
def test_tensors_larger_than_the_free_disk_are_refused_before_a_byte_is_written(tmp_path, attempts):
    # Never computed: four petabytes of zeros.
    arrays = {"weight": mx.zeros((10**6, 10**6, 1000))}
    with pytest.raises(UnwritableError, match=r"it takes 4,000\.0 TB, and the disk has .* free"):
        write_tensors(tmp_path / "large.safetensors", arrays, {})
    assert list(tmp_path.iterdir()) == []
    attempts.add()


@pytest.fixture
def small_disk(tmp_path):
    """Return the folder of a disk of three megabytes, and a function that makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only the superuser may mount a disk")

    def grow() -> None:
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)

    yield folder, grow
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.proves("F11")
def test_a_disk_too_small_for_a_checkpoint_ends_the_run_with_75_and_the_resume_line(
    small_disk, capsys, attempts
):
    folder, grow = small_disk
    argv = ["train", "--env", "add", "--groups-per-step", "2", "--group-size", "2", "--count", "2"]
    argv += ["--steps", "4", "--output", str(folder / "run")]
    assert main(argv) == 2
    assert "has 3.1 MB free" in capsys.readouterr().err
    assert main([*argv, "--limits", "warn"]) == 75
    told = capsys.readouterr().err
    assert "alarm at step" in told and ": disk: the disk of" in told
    assert f"textpolicy train --resume {folder / 'run'}" in told
    grow()
    assert main(["train", "--resume", str(folder / "run")]) == 0
    attempts.add()
