"""Damaged, doctored and half-written adapter files: none loads, and every refusal is an error."""

import json
import random
import struct
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from tests.faults.attempts import Attempts
from textpolicy.adapters import Adapter, AdapterConfig
from textpolicy.adapters.files.adapter_file import adapter_metadata, peek_version, read_adapter_file
from textpolicy.adapters.files.adapter_file import write_adapter_file as write_file
from textpolicy.adapters.files.tensor_file import CHECKSUM_KEY
from textpolicy.errors import AdapterError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "best.safetensors"


def adapter(version: int = 1) -> Adapter:
    arrays = {
        "layer.lora_a": mx.random.normal((16, 4)),
        "layer.lora_b": mx.random.normal((4, 16)),
    }
    return Adapter(origin="a test", arrays=arrays, config=AdapterConfig(rank=4), version=version)


def split(path: Path) -> tuple[dict, bytes]:
    """The header and the payload of a safetensors file."""
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:start]), content[start:]


def join(path: Path, header: dict, payload: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


@pytest.mark.proves("S18")
def test_a_flipped_bit_anywhere_in_an_adapter_file_is_refused_by_name(
    path: Path, attempts: Attempts
) -> None:
    whole = write_file(path, adapter()).read_bytes()
    payload = 8 + struct.unpack("<Q", whole[:8])[0]
    dice = random.Random(0)
    # Every byte of the tensors, and places in the header.
    places = [*range(payload, len(whole)), *dice.sample(range(payload), 200)]
    for place in places:
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << dice.randrange(8)
        path.write_bytes(spoilt)
        with pytest.raises(AdapterError, match=r"best\.safetensors"):
            read_adapter_file(path)
    attempts(len(places))


@pytest.mark.proves("S18")
def test_other_bytes_under_the_header_of_an_adapter_are_refused(
    path: Path, attempts: Attempts
) -> None:
    write_file(path, adapter())
    header, _ = split(path)
    _, other = split(write_file(path, adapter()))
    join(path, header, other)
    with pytest.raises(AdapterError, match="is damaged: its content differs"):
        read_adapter_file(path)
    attempts.add()


def test_the_checksum_is_of_the_file_as_anybody_can_compute_it(path: Path) -> None:
    import hashlib

    content = write_file(path, adapter()).read_bytes()
    own = split(path)[0]["__metadata__"][CHECKSUM_KEY]
    assert hashlib.sha256(content.replace(own.encode(), b"0" * 64)).hexdigest() == own


def test_other_readers_open_a_file_with_a_checksum_and_see_the_same_numbers(path: Path) -> None:
    arrays = read_adapter_file(write_file(path, adapter())).arrays
    with safe_open(path, "np") as file:
        assert set(file.keys()) == set(arrays)
        assert all(np.array_equal(file.get_tensor(name), arrays[name]) for name in arrays)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int8, mx.uint32])
def test_every_dtype_is_read_back_as_mlx_wrote_it(path: Path, dtype: mx.Dtype) -> None:
    array = mx.random.uniform(0, 50, (3, 5)).astype(dtype)
    one = Adapter(origin="a test", arrays={"layer.lora_a": array}, config=AdapterConfig())
    read = read_adapter_file(write_file(path, one)).arrays["layer.lora_a"]
    assert read.dtype == dtype and mx.array_equal(read, array)


def test_a_file_of_an_earlier_release_loads_with_a_note(path: Path) -> None:
    old = adapter_metadata(adapter()) | {"format_version": "1"}
    mx.save_safetensors(str(path), dict(adapter().arrays), old)
    with pytest.warns(UserWarning, match=r"best\.safetensors has no checksum.*Save the adapter"):
        assert read_adapter_file(path).version == 1
    write_file(path, read_with_note(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_adapter_file(path).version == 1


def read_with_note(path: Path) -> Adapter:
    with pytest.warns(UserWarning, match="no checksum"):
        return read_adapter_file(path)


def test_a_checksum_cannot_be_taken_away(path: Path) -> None:
    header, payload = split(write_file(path, adapter()))
    del header["__metadata__"][CHECKSUM_KEY]
    join(path, header, payload)
    with pytest.raises(AdapterError, match="checksum is missing"):
        read_adapter_file(path)


def doctored_headers() -> dict[str, dict]:
    """Headers of two float32 tensors over 32 bytes that no honest writer makes."""

    def two(first: list, second: list, **more) -> dict:
        shapes = {"a": first, "b": second}
        return {
            name: {"dtype": "F32", "shape": [4], "data_offsets": span} | more
            for name, span in shapes.items()
        }

    right = two([0, 16], [16, 32])
    return {
        "the same bytes twice": two([0, 16], [0, 16]),
        "overlapping tensors": two([0, 16], [8, 24]),
        "a gap": two([0, 16], [20, 36]),
        "reversed offsets": two([16, 0], [16, 32]),
        "negative offsets": two([-16, 0], [0, 32]),
        "beyond the end": two([0, 16], [16, 2**62]),
        "another shape": two([0, 16], [16, 32], shape=[5]),
        "a negative shape": two([0, 16], [16, 32], shape=[-2, -2]),
        "a huge shape": two([0, 16], [16, 32], shape=[2**40, 2**40]),
        "nine axes": two([0, 16], [16, 32], shape=[4, *[1] * 8]),
        "a shape of booleans": two([0, 16], [16, 32], shape=[True, 4]),
        "a shape of text": two([0, 16], [16, 32], shape="4"),
        "an unknown dtype": two([0, 16], [16, 32], dtype="PICKLE"),
        "a dtype of a list": two([0, 16], [16, 32], dtype=["F32"]),
        "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
        "an entry that is a list": right | {"a": [1, 2]},
        "metadata of numbers": right | {"__metadata__": {"version": 1}},
        "metadata that is a list": right | {"__metadata__": ["format"]},
        "deep metadata": right | {"__metadata__": json.loads("[" * 900 + "]" * 900)},
        "a list": [right],
    }


@pytest.mark.proves("S2")
@pytest.mark.parametrize("name", doctored_headers())
def test_a_doctored_header_is_refused_as_an_adapter_error(
    path: Path, name: str, attempts: Attempts
) -> None:
    join(path, doctored_headers()[name], bytes(32))
    for read in (read_adapter_file, peek_version):
        with pytest.raises(AdapterError, match=r"best\.safetensors"):
            read(path)
        attempts.add()


@pytest.mark.proves("S2")
def test_mutated_files_load_whole_or_are_refused(path: Path, attempts: Attempts) -> None:
    whole = write_file(path, adapter()).read_bytes()
    dice = random.Random(1)
    for _ in range(300):
        spoilt = bytearray(whole)
        for _ in range(dice.randrange(1, 4)):
            at, size = dice.randrange(len(spoilt)), dice.randrange(0, 9)
            spoilt[at : at + size] = dice.randbytes(dice.randrange(0, 9))
        if spoilt == whole:
            continue
        path.write_bytes(spoilt)
        with pytest.raises(AdapterError):
            read_adapter_file(path)
        attempts.add()
