"""Checkpoints of a real run, damaged in every way: none is read as something else."""

import struct
from collections.abc import Callable
from random import Random

import mlx.core as mx
import pytest

from tests.quick import quick_first
from tests.test_resume import Run
from textpolicy.errors import AdapterError, TrainingError
from textpolicy.training.checkpoint import Checkpoints, read_checkpoint

TIMES = 200


def flip_a_bit(data: bytearray, random: Random) -> None:
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def flip_a_bit_of_the_header(data: bytearray, random: Random) -> None:
    data[random.randrange(8 + header_size(data))] ^= 1 << random.randrange(8)


def cut_off(data: bytearray, random: Random) -> None:
    del data[random.randrange(len(data)) :]


def cut_out(data: bytearray, random: Random) -> None:
    at = random.randrange(len(data))
    del data[at : at + random.randint(1, 4096)]


def write_zeros(data: bytearray, random: Random) -> None:
    """Do what a disk does that lost a block."""
    at = random.randrange(len(data)) // 512 * 512
    data[at : at + 512] = bytes(len(data[at : at + 512]))


def repeat_a_part(data: bytearray, random: Random) -> None:
    at = random.randrange(len(data))
    data[at:at] = data[at : at + random.randint(1, 4096)]


def exchange_two_blocks(data: bytearray, random: Random) -> None:
    one, other = (random.randrange(len(data) // 512) * 512 for _ in range(2))
    data[one : one + 512], data[other : other + 512] = (
        data[other : other + 512],
        data[one : one + 512],
    )


def write_noise(data: bytearray, random: Random) -> None:
    at = random.randrange(len(data))
    data[at : at + 64] = random.randbytes(len(data[at : at + 64]))


def change_a_digit_of_the_header(data: bytearray, random: Random) -> None:
    """Change an offset, a shape or the hash."""
    digits = [n for n in range(8, 8 + header_size(data)) if chr(data[n]).isdigit()]
    data[random.choice(digits)] = ord(random.choice("0123456789"))


def change_the_length_of_the_header(data: bytearray, random: Random) -> None:
    sizes = (0, 1, 2**62, 2**64 - 1, random.randrange(2**40), random.randrange(len(data)))
    data[:8] = struct.pack("<Q", random.choice(sizes))


DAMAGES = [
    flip_a_bit,
    flip_a_bit_of_the_header,
    cut_off,
    cut_out,
    write_zeros,
    repeat_a_part,
    exchange_two_blocks,
    write_noise,
    change_a_digit_of_the_header,
    change_the_length_of_the_header,
]


def header_size(data: bytearray) -> int:
    return struct.unpack("<Q", data[:8])[0]


@pytest.fixture(scope="module")
def folder(load_tiny, tmp_path_factory):
    """Return the folder of the last two checkpoints of a run."""
    run = Run(load_tiny, tmp_path_factory.mktemp("run"), rank=1)
    run.train(until=3)
    return run.checkpoints.folder


def same(one, other) -> bool:
    return (
        (one.step, one.facts) == (other.step, other.facts)
        and one.arrays.keys() == other.arrays.keys()
        and all(mx.array_equal(one.arrays[n], a) for n, a in other.arrays.items())
    )


@pytest.mark.proves("F3")
@pytest.mark.parametrize("damage", quick_first(3, DAMAGES), ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_refused_or_equal(
    folder, tmp_path, attempts, damage: Callable[[bytearray, Random], None]
):
    whole = max(folder.iterdir())
    expected, content = read_checkpoint(whole), whole.read_bytes()
    path, random = tmp_path / whole.name, Random(damage.__name__)
    refused = 0
    for _ in range(TIMES):
        data = bytearray(content)
        damage(data, random)
        path.write_bytes(data)
        attempts.add()
        try:
            found = read_checkpoint(path)
        except (AdapterError, TrainingError):
            refused += 1
        else:
            assert same(found, expected)
    # Few damages change nothing: a zero on a zero, a bit of a space.
    assert refused > TIMES * 0.6


@pytest.mark.proves("F3")
@pytest.mark.parametrize("damage", quick_first(3, DAMAGES), ids=lambda damage: damage.__name__)
def test_the_checkpoint_before_a_damaged_one_is_taken_and_the_damage_is_told(
    folder, tmp_path, attempts, damage: Callable[[bytearray, Random], None]
):
    older, newest = sorted(folder.iterdir())
    (tmp_path / older.name).write_bytes(older.read_bytes())
    content, random = newest.read_bytes(), Random(damage.__name__)
    damaged = tmp_path / newest.name
    for _ in range(5):
        data = bytearray(content)
        while data == content or not refused(damaged, data):
            data = bytearray(content)
            damage(data, random)
        checkpoints = Checkpoints(tmp_path)
        assert same(checkpoints.newest(), read_checkpoint(older))
        assert [str(damaged) in told for told in checkpoints.damaged] == [True]
        assert damaged.read_bytes() == data
        attempts.add()


def refused(path, data: bytearray) -> bool:
    """Write the bytes, and return whether they are not a checkpoint."""
    path.write_bytes(data)
    try:
        read_checkpoint(path)
    except (AdapterError, TrainingError):
        return True
    return False
