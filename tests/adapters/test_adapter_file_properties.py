"""Adapter files: any adapter comes back exactly, and no changed file loads as another adapter."""

import re
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.strategies import JSON, JSON_TABLES, examples
from textpolicy.adapters import Adapter, AdapterConfig, LoRARule
from textpolicy.adapters.files.adapter_file import peek_version, read_adapter_file
from textpolicy.adapters.files.adapter_file import write_adapter_file as write_file
from textpolicy.errors import AdapterError, ConfigError

DTYPES = {
    mx.float32: np.uint32,
    mx.float16: np.uint16,
    mx.bfloat16: np.uint16,
    mx.int8: np.uint8,
    mx.uint32: np.uint32,
}
# safetensors reserves one name for the metadata.
NAMES = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda n: n != "__metadata__")


@st.composite
def tensors(draw: st.DrawFn) -> mx.array:
    """Return a tensor of any bits, NaN included."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = int(np.prod(shape))
    bits = draw(st.lists(st.integers(0, 2 ** (8 * dtype.size) - 1), min_size=count, max_size=count))
    return mx.array(np.array(bits, DTYPES[dtype]).reshape(shape)).view(dtype)


def bits_of(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.array(0, dtype=_UNSIGNED[array.dtype.size]).dtype))


_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


@st.composite
def rules(draw: st.DrawFn) -> LoRARule:
    rank, scale = draw(st.integers(1, 64)), draw(st.floats(1e-6, 1e6))
    other_way = draw(st.booleans())
    qtype = draw(st.sampled_from([None, "int4", "nf4", "mxfp8"]))
    return LoRARule(
        module_path=draw(st.sampled_from([".*", r"layers\.\d+\.q", "a|b"]) | NAMES.map(re.escape))
        or ".*",
        kind=draw(st.sampled_from(["lora", "dora", "none"])),
        rank=rank,
        **({"alpha": scale, "rslora": draw(st.booleans())} if other_way else {"scale": scale}),
        dropout=draw(st.floats(0, 0.99)),
        a_init=draw(st.sampled_from(["uniform", "gaussian", "he_uniform"])),
        weight_qtype=qtype,
        tile_size=draw(st.sampled_from([None, 64, "channel"])) if qtype == "nf4" else None,
        bias=draw(st.booleans()),
    )


LAST_BLOCKS = st.builds(
    AdapterConfig,
    num_layers=st.sampled_from([None, -1, 1, 40]),
    keys=st.none() | st.lists(NAMES, min_size=1, max_size=3),
    kind=st.sampled_from([None, "lora", "dora"]),
    rank=st.none() | st.integers(1, 64),
    scale=st.none() | st.floats(1e-6, 1e6),
    dropout=st.none() | st.floats(0, 0.99),
)
CONFIGS = LAST_BLOCKS | st.lists(rules(), min_size=1, max_size=3).map(
    lambda some: AdapterConfig(rules=some)
)
ADAPTERS = st.builds(
    Adapter,
    origin=st.just("a test"),
    arrays=st.dictionaries(NAMES, tensors(), min_size=1, max_size=4),
    config=CONFIGS,
    version=st.integers(0, 2**63),
    fingerprint=st.none() | st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
    quantization=st.none() | JSON_TABLES,
)


def assert_same(found: Adapter, written: Adapter) -> None:
    assert found.arrays.keys() == written.arrays.keys()
    for name, array in written.arrays.items():
        own = found.arrays[name]
        assert own.dtype == array.dtype and own.shape == array.shape, name
        assert np.array_equal(bits_of(own), bits_of(array)), name
    for name in ("config", "version", "fingerprint", "quantization"):
        assert getattr(found, name) == getattr(written, name), name


@given(ADAPTERS)
def test_any_adapter_is_read_back_exactly(tmp_path: Path, adapter: Adapter):
    (tmp_path / "a.safetensors").unlink(missing_ok=True)
    path = write_file(tmp_path / "a.safetensors", adapter)
    assert peek_version(path) == adapter.version
    assert_same(read_adapter_file(path), adapter)


@given(CONFIGS)
def test_a_config_is_read_back_equal_from_its_json(config: AdapterConfig):
    assert AdapterConfig.from_dict(config.to_dict()) == config


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "rules",
                "rank",
                "lora_rank",
                "lora_parameters",
                "fine_tune_type",
                "num_layers",
                "keys",
                "target_modules",
                "peft_type",
                "r",
                "lora_alpha",
                "layers_to_transform",
                "rank_pattern",
            ]
        ),
        JSON | st.sampled_from([1, 8, "LORA", "lora", ["q_proj"], {"rank": 4}, [{"rank": 0}]]),
    )
)
@example({"rank": 10**400, "alpha": 1.0})
@examples(3)
def test_any_json_is_an_adapter_config_or_a_config_error(data: dict):
    try:
        config = AdapterConfig.from_dict(data)
    except ConfigError:
        return
    assert AdapterConfig.from_dict(config.to_dict()) == config


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[bytes, Adapter]:
    """The bytes of a small file, and its adapter."""
    arrays = {
        "layer.lora_a": mx.arange(32, dtype=mx.float32).reshape(8, 4),
        "layer.lora_b": mx.ones((4, 8)),
    }
    adapter = Adapter(origin="a test", arrays=arrays, config=AdapterConfig(rank=4), version=3)
    path = write_file(tmp_path_factory.mktemp("whole") / "a.safetensors", adapter)
    return path.read_bytes(), adapter


def assert_refused_or_the_same(path: Path, content: bytes, adapter: Adapter) -> None:
    path.write_bytes(content)
    try:
        found = read_adapter_file(path)
    except AdapterError as error:
        assert path.name in str(error)
    else:
        assert_same(found, adapter)


PLACES = st.floats(0, 1, exclude_max=True)
# Half of the places are in the header, where a change can mean something.
IN_HEADER = st.booleans()


@given(PLACES, IN_HEADER, st.integers(0, 255))
@examples(5)
def test_no_changed_byte_makes_a_file_another_adapter(tmp_path, whole, place, header, byte):
    content, adapter = whole
    spoilt = bytearray(content)
    spoilt[_at(content, place, header)] = byte
    assert_refused_or_the_same(tmp_path / "a.safetensors", bytes(spoilt), adapter)


@given(PLACES, IN_HEADER, st.binary(min_size=1, max_size=3) | st.sampled_from([b"0", b" ", b'"']))
@examples(5)
def test_no_inserted_bytes_make_a_file_another_adapter(tmp_path, whole, place, header, more):
    content, adapter = whole
    at = _at(content, place, header)
    spoilt = content[:at] + more + content[at:]
    assert_refused_or_the_same(tmp_path / "a.safetensors", spoilt, adapter)


@given(PLACES, IN_HEADER, st.integers(1, 40), st.booleans())
@examples(5)
def test_no_lost_bytes_make_a_file_another_adapter(tmp_path, whole, place, header, count, cut):
    content, adapter = whole
    at = _at(content, place, header)
    spoilt = content[:at] + (b"" if cut else content[at + count :])
    assert_refused_or_the_same(tmp_path / "a.safetensors", spoilt, adapter)


def _at(content: bytes, place: float, header: bool) -> int:
    end = 8 + struct.unpack("<Q", content[:8])[0] if header else len(content)
    return int(place * end)
