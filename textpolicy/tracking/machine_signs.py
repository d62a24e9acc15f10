"""Signs of a machine that runs full: its disk, and its memory."""

from pathlib import Path

from textpolicy.machine import MemoryPressure, free_disk_bytes, memory_bytes, size_text

Sign = tuple[str, str, str]
"""The fields `got`, `expected` and `advice` of an alarm."""
# A disk with room for fewer further checkpoints is nearly full.
_CHECKPOINTS_LEFT = 10
# The share of the memory that all programs may move to swap during a run.
_SWAPPED_SHARE = 1 / 50


def low_disk(checkpoints: Path) -> Sign | None:
    """Return the sign of a disk that has little room beside the checkpoints in this folder."""
    sizes = [path.stat().st_size for path in checkpoints.glob("*.safetensors")]
    free, needed = free_disk_bytes(checkpoints), _CHECKPOINTS_LEFT * max(sizes, default=0)
    if free >= needed:
        return None
    return (
        f"the disk of {checkpoints} has {size_text(free)} free",
        f"at least {size_text(needed)}, which is {_CHECKPOINTS_LEFT} checkpoints",
        "Free some space. A run that cannot save a checkpoint ends and can be resumed",
    )


def low_memory(before: MemoryPressure, now: MemoryPressure) -> Sign | None:
    """Return the sign of a machine that has begun to swap since the pressure was as before."""
    swapped, most = now.swapped - before.swapped, int(memory_bytes() * _SWAPPED_SHARE)
    if swapped <= most and not now.warned:
        return None
    warned = ", and macOS warns of memory pressure" if now.warned else ""
    return (
        f"{size_text(max(swapped, 0))} were moved to swap since the run began{warned}",
        f"at most {size_text(most)}, and no warning",
        "A machine that swaps is slow, and a Mac can freeze. Close other programs, or start a "
        "smaller run: --checkpoint-gradients, --micro-batch-size 1, fewer --max-tokens",
    )
