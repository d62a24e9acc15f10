"""Adapter files: whole or refused, replaced in one step, and noticed when they are."""

import json
import os
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.tiny import TOKENS, qwen3_model
from textpolicy.adapters import (
    Adapter,
    AdapterConfig,
    AdapterContainer,
    AdapterWatcher,
    peek_version,
    quantize,
    read_adapter,
)
from textpolicy.adapters.files import destination, write_file
from textpolicy.adapters.fingerprint import fingerprint
from textpolicy.errors import AdapterError

KEYS = ["self_attn.q_proj", "mlp.up_proj"]
CONFIG = AdapterConfig(rank=4, scale=2.0, keys=KEYS)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "adapters.safetensors"


def write(path: Path, version: int = 1, **changes) -> Path:
    """A small adapter whose tensors all hold its version."""
    arrays = {f"layer.{name}": mx.full((64, 8), version) for name in ("lora_a", "lora_b")}
    options = {"arrays": arrays, "config": CONFIG, "version": version, "fingerprint": "f" * 64}
    return write_file(path, Adapter(origin="a test", **options | changes))


def adapted(seed: int = 0, config: AdapterConfig = CONFIG) -> tuple[nn.Module, AdapterContainer]:
    model = qwen3_model(seed=seed)
    container = AdapterContainer.from_model(model, config, seed=seed)
    for layer in container.layers().values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(seed)) * 0.1
    return model, container


def rewritten(path: Path, **metadata: str) -> Path:
    """The file with some of its metadata changed."""
    arrays, old = mx.load(str(path), return_metadata=True)
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays, old | metadata)
    return path


# One file is one adapter


def test_a_file_holds_tensors_config_version_and_base(path):
    model, container = adapted()
    container.version = 7
    assert container.publish(path) == 7
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    file = read_adapter(path)
    assert file.config == CONFIG and file.version == 7 and file.origin == str(path)
    assert file.fingerprint == fingerprint(model) and file.quantization is None
    own = container.parameters()
    assert file.arrays.keys() == own.keys()
    assert all(mx.array_equal(array, own[name]) for name, array in file.arrays.items())


def test_swapping_to_a_file_takes_its_tensors_and_version(path):
    model, container = adapted()
    container.version = 7
    container.publish(path)
    other = qwen3_model()
    follower = AdapterContainer.from_model(other, CONFIG, seed=5)
    assert follower.swap(path) == 7 == follower.version
    assert mx.array_equal(model(TOKENS), other(TOKENS))


def test_publishing_goes_to_the_publish_path_unless_told(path, tmp_path):
    _model, container = adapted()
    with pytest.raises(AdapterError, match="publish_path"):
        container.publish()
    container.publish_path = path
    container.publish()
    container.publish(tmp_path / "other.safetensors")
    assert container.publish_path == path
    assert read_adapter(tmp_path / "other.safetensors").version == read_adapter(path).version == 0


def test_reading_is_done_when_it_returns(path):
    file = read_adapter(write(path, 1))
    write(path, 2)
    assert float(file.arrays["layer.lora_a"].max()) == 1


def test_the_header_alone_gives_the_version(path):
    assert peek_version(write(path, 12)) == 12


def test_safetensors_of_any_reader_opens_the_file(path):
    from safetensors.numpy import load_file

    assert load_file(write(path, 3))["layer.lora_a"].shape == (64, 8)


# What does not fit


def refusal(container: AdapterContainer, path: Path) -> str:
    before, version = container.parameters(), container.version
    with pytest.raises(AdapterError) as caught:
        container.swap(path)
    assert container.version == version
    assert all(array is before[name] for name, array in container.parameters().items())
    return str(caught.value)


def test_adapters_of_another_base_are_refused(path):
    _other, theirs = adapted(seed=1)
    theirs.publish(path)
    _model, container = adapted()
    message = refusal(container, path)
    assert str(path) in message and "base fingerprint" in message
    assert "another model?" in message


def test_everything_that_does_not_fit_is_said_in_one_message(path):
    """Another base, another kind, other modules, a wrong shape and a number that is none."""
    other = qwen3_model(seed=1)
    config = AdapterConfig(rank=4, kind="dora", keys=["self_attn.q_proj", "mlp.down_proj"])
    theirs = AdapterContainer.from_model(other, config)
    tensors = dict(theirs.parameters())
    q = "model.layers.0.self_attn.q_proj"
    tensors[f"{q}.lora_a"] = mx.zeros((32, 4))
    tensors[f"{q}.lora_b"] = tensors[f"{q}.lora_b"] * mx.nan
    write_file(path, replace(theirs.adapter(), arrays=tensors))
    _model, container = adapted()
    message = refusal(container, path)
    for words in [
        "base fingerprint",
        f"{q}.lora_a: shape (32, 4), model has (64, 4)",
        f"{q}.lora_b: not finite",
        f"{q}.m: no such adapter in the model",
        "model.layers.1.mlp.up_proj.lora_b: missing",
        "model.layers.1.mlp.down_proj.lora_b: no such adapter in the model",
    ]:
        assert words in message, words


def test_a_fresh_model_is_told_everything_too(path):
    _model, theirs = adapted(seed=1)
    tensors = dict(theirs.parameters())
    tensors.pop("model.layers.0.mlp.up_proj.lora_a")
    write_file(path, replace(theirs.adapter(), arrays=tensors))
    model = qwen3_model()
    with pytest.raises(AdapterError) as caught:
        AdapterContainer.from_directory(path).load(model)
    assert "base fingerprint" in str(caught.value)
    assert "model.layers.0.mlp.up_proj.lora_a: missing" in str(caught.value)
    assert AdapterContainer.of(model) is None


def test_a_config_that_does_not_fit_is_told_beside_the_base(path):
    other = qwen3_model(layers=3)
    config = AdapterConfig(keys=["model.layers.2.mlp.up_proj"])
    AdapterContainer.from_model(other, config).publish(path)
    with pytest.raises(AdapterError) as caught:
        AdapterContainer.from_directory(path).load(qwen3_model())
    assert "base fingerprint" in str(caught.value) and "matches nothing" in str(caught.value)


def test_other_targets_are_listed_as_missing_and_unknown(path):
    _other, theirs = adapted(config=AdapterConfig(rank=4, keys=["self_attn.q_proj", "lm_head"]))
    theirs.publish(path)
    _model, container = adapted()
    message = refusal(container, path)
    assert "model.layers.1.mlp.up_proj.lora_b: missing" in message
    assert "lm_head.lora_a: no such adapter in the model" in message


def test_numbers_that_are_not_finite_are_refused(path):
    model, container = adapted()
    model.layers[0].mlp.up_proj.lora_b = model.layers[0].mlp.up_proj.lora_b * mx.inf
    container.publish(path)
    _model, fresh = adapted()
    assert "model.layers.0.mlp.up_proj.lora_b: not finite" in refusal(fresh, path)


def test_adapters_of_a_quantized_base_do_not_fit_a_float_one(path):
    model = qwen3_model()
    quantize(model)
    AdapterContainer.from_model(model, CONFIG).publish(path)
    _model, container = adapted()
    message = refusal(container, path)
    assert (
        "base quantization: {'bits': 4, 'group_size': 64, 'mode': 'affine'} in the file" in message
    )
    assert "None in the model" in message


# What is not a whole adapter


@pytest.mark.parametrize("part", [0, 5, 60, 0.5, 0.999])
def test_a_part_of_a_file_is_refused(path, part):
    whole = write(path).read_bytes()
    cut = int(part * len(whole)) if part < 1 else part
    path.write_bytes(whole[:cut])
    for read in (read_adapter, peek_version):
        with pytest.raises(AdapterError, match="not a whole adapter file"):
            read(path)


@pytest.mark.parametrize("content", [b"hello", b"x" * 100, struct.pack("<Q", 2) + b"[]"])
def test_something_else_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(AdapterError, match="not a whole adapter file"):
        read_adapter(path)


def test_tensors_of_another_kind_are_refused(path):
    mx.save_safetensors(str(path), {"weight": mx.zeros((2,))}, {"format": "mlx"})
    with pytest.raises(AdapterError, match=r"format is 'mlx', expected 'textpolicy\.adapter'"):
        read_adapter(path)


def test_a_folder_and_a_missing_file_are_told_apart(tmp_path):
    with pytest.raises(AdapterError, match=r"is a folder with no adapters in it; expected one of"):
        read_adapter(tmp_path)
    with pytest.raises(AdapterError, match="is a folder; expected one adapter file"):
        peek_version(tmp_path)
    with pytest.raises(AdapterError, match="No such file"):
        read_adapter(tmp_path / "none.safetensors")


def test_a_later_format_says_which_it_is(path):
    rewritten(write(path), format_version="2")
    with pytest.raises(AdapterError, match="format version 2; this library reads 1"):
        read_adapter(path)


def test_a_config_that_cannot_be_read_names_the_file(path):
    rewritten(write(path), config=json.dumps({"fine_tune_type": "unheard of"}))
    with pytest.raises(AdapterError, match=r"adapters\.safetensors cannot be read.*unheard of"):
        read_adapter(path)


# Writing


def test_nothing_is_written_for_no_tensors(path):
    with pytest.raises(AdapterError, match="no adapter tensors"):
        write(path, arrays={})
    assert not path.exists()


def test_folders_on_the_way_are_made(tmp_path):
    assert write(tmp_path / "runs" / "one" / "a.safetensors").is_file()


def test_a_path_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError, match=r"cannot be written.*\n.*folder that this process may"):
        write(tmp_path / "file" / "a.safetensors")
    with pytest.raises(AdapterError, match="is a folder"):
        folder = tmp_path / "folder.safetensors"
        folder.mkdir()
        write(folder)
    with pytest.raises(AdapterError, match=r"ending in \.safetensors"):
        write(tmp_path / "adapters.bin")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_refused_before_anything_is_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(AdapterError, match="no permission"):
        destination(tmp_path / "a.safetensors")


# A file that may not grow is what a full disk looks like to a writer.
WRITER_WITHOUT_ROOM = """
import resource, signal, sys
import mlx.core as mx
from textpolicy.adapters import Adapter, AdapterConfig
from textpolicy.adapters.files import write_file
from textpolicy.errors import AdapterError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
arrays = {"a": mx.zeros((100_000,))}
try:
    write_file(sys.argv[1], Adapter(origin="a test", arrays=arrays, config=AdapterConfig()))
except AdapterError as error:
    print(error)
"""


def test_a_write_that_fails_leaves_the_old_file_and_no_other(path):
    write(path, 1)
    command = [sys.executable, "-c", WRITER_WITHOUT_ROOM, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "cannot be written" in done.stdout, done.stderr
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert read_adapter(path).version == 1


def test_weights_of_another_kind_are_not_replaced(path):
    mx.save_safetensors(str(path), {"weight": mx.zeros((2,))})
    before = path.read_bytes()
    with pytest.raises(AdapterError, match="will not be replaced"):
        write(path)
    assert path.read_bytes() == before


def test_an_empty_file_may_be_replaced(path):
    path.touch()
    write(path, 3)
    assert peek_version(path) == 3


READER = """
import sys, time
from textpolicy.adapters import read_adapter
path, last, good, versions = sys.argv[1], int(sys.argv[2]), 0, set()
print("ready", flush=True)
deadline = time.monotonic() + 30
while time.monotonic() < deadline:
    file = read_adapter(path)
    values = {float(v) for a in file.arrays.values() for v in (a.min(), a.max())}
    assert values == {float(file.version)}, (values, file.version)
    good += 1
    versions.add(file.version)
    if file.version == last:
        break
print(good, len(versions), max(versions))
"""


def test_a_reader_sees_whole_adapters_while_they_are_replaced(path):
    count = 60
    write(path, 0)
    command = [sys.executable, "-c", READER, str(path), str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "ready\n"
        for version in range(1, count + 1):
            write(path, version)
            time.sleep(0.003)
        good, distinct, newest = map(int, reader.stdout.read().split())
    assert reader.returncode == 0
    assert newest == count and good >= distinct > 3
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


# Watching


def test_a_watcher_reports_each_new_file_once(path):
    watcher = AdapterWatcher(path)
    assert watcher.poll() is None
    write(path, 1)
    assert watcher.poll() == path
    watcher.accept()
    assert watcher.poll() is None
    write(path, 2)
    write(path, 3)
    assert watcher.poll() == path
    watcher.accept()
    assert watcher.poll() is None


def test_a_file_that_was_not_accepted_is_reported_again(path):
    watcher = AdapterWatcher(path)
    write(path, 1)
    assert watcher.poll() == watcher.poll() == path


def test_what_lies_there_when_watching_begins_is_not_new(path):
    write(path, 57)
    watcher = AdapterWatcher(path)
    assert watcher.poll() is None
    write(path, 1)
    assert watcher.poll() == path


def test_a_version_is_noticed_even_if_time_and_size_say_nothing(path):
    write(path, 1)
    watcher = AdapterWatcher(path)
    stat = path.stat()
    content = path.read_bytes().replace(b'"version":"1"', b'"version":"2"')
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_size) == (stat.st_ino, stat.st_size)
    assert watcher.poll() == path


# Fingerprints


def test_the_fingerprint_of_a_base_does_not_depend_on_the_dtype_it_is_loaded_in():
    model = qwen3_model()
    model.set_dtype(mx.bfloat16)
    in_bfloat16 = fingerprint(model)
    model.set_dtype(mx.float32)
    assert fingerprint(model) == in_bfloat16


def test_the_fingerprint_of_a_base_does_not_see_its_adapters():
    model = qwen3_model()
    before = fingerprint(model)
    container = AdapterContainer.from_model(model, CONFIG)
    assert fingerprint(model) == before == container.fingerprint
    quantized = qwen3_model()
    quantize(quantized)
    before = fingerprint(quantized)
    AdapterContainer.from_model(quantized, CONFIG)
    assert fingerprint(quantized) == before


def test_another_architecture_norm_matrix_or_quantization_has_another_fingerprint():
    def changed(where: str) -> nn.Module:
        model = qwen3_model()
        weights = dict(model.named_modules())[where]
        weights.weight = weights.weight * 1.01
        return model

    def quantized(bits: int) -> nn.Module:
        model = qwen3_model()
        quantize(model, bits)
        return model

    models = [
        qwen3_model(),
        qwen3_model(layers=3),
        qwen3_model(num_key_value_heads=2),
        changed("model.norm"),
        changed("model.layers.1.mlp.up_proj"),
        quantized(4),
        quantized(8),
    ]
    assert len({fingerprint(model) for model in models}) == len(models)


def test_fused_adapters_change_the_fingerprint():
    model, container = adapted()
    before = container.fingerprint
    container.fuse()
    assert fingerprint(model) != before
