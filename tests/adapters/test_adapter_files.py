"""Adapter files: whole or refused, replaced in one step, and noticed when they are."""

import json
import os
import random
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import save_config

from tests.bases import trained
from tests.tiny import TOKENS, expert_model, qwen3_model
from textpolicy.adapters import (
    Adapter,
    AdapterConfig,
    AdapterContainer,
    AdapterPublisher,
    AdapterWatcher,
    LoRARule,
    inspect_adapter,
    peek_version,
    quantize,
    read_adapter,
)
from textpolicy.adapters.base_identity import base_fingerprint
from textpolicy.adapters.files.adapter_file import prepare_adapter_path, write_adapter_file
from textpolicy.adapters.files.tensor_file import write_tensors
from textpolicy.cli.main import main
from textpolicy.errors import AdapterError, ConfigError
from textpolicy.generation.mlx_generation import load_model

KEYS = ["self_attn.q_proj", "mlp.up_proj"]
CONFIG = AdapterConfig(rank=4, scale=2.0, keys=KEYS)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "adapters.safetensors"


def write(path: Path, version: int = 1, **changes) -> Path:
    """A small adapter whose tensors all hold its version."""
    arrays = {f"layer.{name}": mx.full((64, 8), version) for name in ("lora_a", "lora_b")}
    options = {"arrays": arrays, "config": CONFIG, "version": version, "fingerprint": "f" * 64}
    return write_adapter_file(path, Adapter(origin="a test", **options | changes))


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
    write_tensors(path, arrays, old | metadata)
    return path


# One file is one adapter


def test_a_file_holds_tensors_config_version_and_base(path):
    model, container = adapted()
    container.version = 7
    assert container.publish(path) == 7
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    file = read_adapter(path)
    assert file.config == CONFIG and file.version == 7 and file.origin == str(path)
    assert file.fingerprint == base_fingerprint(model) and file.quantization is None
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
    write_adapter_file(path, replace(theirs.adapter(), arrays=tensors))
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
    write_adapter_file(path, replace(theirs.adapter(), arrays=tensors))
    model = qwen3_model()
    with pytest.raises(AdapterError) as caught:
        AdapterContainer.from_directory(path).load(model)
    assert "base fingerprint" in str(caught.value)
    assert "model.layers.0.mlp.up_proj.lora_a: missing" in str(caught.value)
    assert AdapterContainer.of(model) is None


def test_a_swap_whose_config_does_not_fit_is_told_the_base_too(path):
    other = qwen3_model(layers=3)
    config = AdapterConfig(keys=["model.layers.2.mlp.up_proj"])
    AdapterContainer.from_model(other, config).publish(path)
    _model, container = adapted()
    message = refusal(container, path)
    assert (
        "base fingerprint" in message and "model.layers.2.mlp.up_proj' matches nothing" in message
    )


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
        with pytest.raises(AdapterError, match="not a whole safetensors file"):
            read(path)


@pytest.mark.parametrize("content", [b"hello", b"x" * 100, struct.pack("<Q", 2) + b"[]"])
def test_something_else_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        read_adapter(path)


def test_tensors_of_another_kind_are_refused(path):
    mx.save_safetensors(str(path), {"weight": mx.zeros((2,))}, {"format": "mlx"})
    with pytest.raises(AdapterError, match=r"format is 'mlx', expected 'textpolicy\.adapter'"):
        read_adapter(path)


def test_a_folder_and_a_missing_file_are_told_apart(tmp_path):
    with pytest.raises(AdapterError, match=r"is a folder with no adapters in it; expected one of"):
        read_adapter(tmp_path)
    with pytest.raises(AdapterError, match="is a folder; expected a file"):
        peek_version(tmp_path)
    with pytest.raises(AdapterError, match="No such file"):
        read_adapter(tmp_path / "none.safetensors")


def test_a_later_format_says_which_it_is(path):
    rewritten(write(path), format_version="3")
    with pytest.raises(AdapterError, match="format version 3; this library reads 1 and 2"):
        read_adapter(path)


def test_a_config_that_cannot_be_read_names_the_file(path):
    rewritten(write(path), config=json.dumps({"fine_tune_type": "unheard of"}))
    with pytest.raises(AdapterError, match=r"adapters\.safetensors cannot be read.*unheard of"):
        read_adapter(path)


@pytest.mark.slow
def test_no_change_of_bytes_in_a_header_gets_past_as_another_error(path):
    raw = write(path).read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    dice, refused = random.Random(0), 0
    for _ in range(1500):
        spoilt = bytearray(raw)
        for _ in range(dice.choice((1, 1, 2, 4))):
            spoilt[dice.randrange(end)] = dice.choice((dice.randrange(256), *b'"9-0{'))
        path.write_bytes(spoilt)
        for look in (inspect_adapter, peek_version):
            try:
                look(path)
            except AdapterError:
                refused += 1
    assert refused > 1500


# Writing


def test_nothing_is_written_for_no_tensors(path):
    with pytest.raises(AdapterError, match="no tensors to write"):
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
        prepare_adapter_path(tmp_path / "a.safetensors")


# A file that may not grow is what a full disk looks like to a writer.
WRITER_WITHOUT_ROOM = """
import resource, signal, sys
import mlx.core as mx
from textpolicy.adapters import Adapter, AdapterConfig
from textpolicy.adapters.files.adapter_file import write_adapter_file
from textpolicy.cli.main import main
from textpolicy.errors import AdapterError, ConfigError
from textpolicy.generation.mlx_generation import load_model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
arrays = {"a": mx.zeros((100_000,))}
try:
    write_adapter_file(sys.argv[1], Adapter(origin="a test", arrays=arrays, config=AdapterConfig()))
except AdapterError as error:
    print(error)
"""


@pytest.mark.slow
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


# Watching


@pytest.mark.proves("F17")
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


@pytest.mark.proves("F17")
def test_what_lies_there_when_watching_begins_is_not_new(path):
    write(path, 57)
    watcher = AdapterWatcher(path)
    assert watcher.poll() is None
    write(path, 1)
    assert watcher.poll() == path


@pytest.mark.proves("F17")
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
    in_bfloat16 = base_fingerprint(model)
    model.set_dtype(mx.float32)
    assert base_fingerprint(model) == in_bfloat16


def test_the_fingerprint_of_a_base_does_not_see_its_adapters():
    model = qwen3_model()
    before = base_fingerprint(model)
    container = AdapterContainer.from_model(model, CONFIG)
    assert base_fingerprint(model) == before == container.fingerprint
    quantized = qwen3_model()
    quantize(quantized)
    before = base_fingerprint(quantized)
    AdapterContainer.from_model(quantized, CONFIG)
    assert base_fingerprint(quantized) == before


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
    assert len({base_fingerprint(model) for model in models}) == len(models)


def test_fused_adapters_change_the_fingerprint():
    model, container = adapted()
    before = container.fingerprint
    container.fuse()
    assert base_fingerprint(model) != before


# Other processes


WORKER = """
import sys
import mlx.core as mx
from tests.tiny import TOKENS, qwen3_model
from textpolicy import fast_cpu
from textpolicy.adapters import AdapterContainer, AdapterWatcher
# The parent process multiplies with this BLAS too, and the numbers must be equal bit for bit.
fast_cpu.enable()
path, last = sys.argv[1], int(sys.argv[2])
watcher = AdapterWatcher(path, from_start=True)
model, adapters = qwen3_model(), None
print("ready", flush=True)
while adapters is None or adapters.version < last:
    found = watcher.wait(timeout=30)
    if adapters:
        adapters.swap(found)
    else:
        adapters = AdapterContainer.from_directory(found).load(model)
    watcher.accept()
print(adapters.version, float(model(TOKENS).sum()))
"""


@pytest.mark.slow
def test_a_worker_in_another_process_follows_a_publisher(path):
    model, container = adapted()
    publisher = AdapterPublisher(path)
    publisher.publish(container)
    command = [sys.executable, "-c", WORKER, str(path), "20"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout.readline() == "ready\n"
        for _ in range(20):
            container.swap({name: array * 1.01 for name, array in container.parameters().items()})
            publisher.publish(container)
        version, total = worker.stdout.read().split()
    assert worker.returncode == 0
    assert int(version) == 20 and float(total) == float(model(TOKENS).sum())


def test_a_publisher_keeps_the_last_versions_as_files_of_their_own(path):
    _model, container = adapted()
    publisher = AdapterPublisher(path, keep=2)
    for version in range(4):
        container.version = version
        assert publisher.publish(container) == version
    assert sorted(publisher.versions()) == [2, 3]
    assert {file.name for file in path.parent.iterdir()} == {
        "adapters.safetensors",
        "adapters-00000002.safetensors",
        "adapters-00000003.safetensors",
    }
    assert read_adapter(publisher.versions()[2]).version == 2
    assert read_adapter(path).version == 3
    with pytest.raises(ConfigError, match="keep is -1"):
        AdapterPublisher(path, keep=-1)


def test_a_watcher_that_waits_in_vain_says_where_it_looked(path):
    with pytest.raises(AdapterError, match=r"no new adapters in .*adapters\.safetensors for 0"):
        AdapterWatcher(path).wait(timeout=0)


# Folders of mlx-lm


def from_mlx_lm(model: nn.Module, folder: Path) -> nn.Module:
    """The bare model with a folder's adapters, as mlx-lm puts them on."""
    model.freeze()
    return load_adapters(model, str(folder)).eval()


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", [None, 4])
def test_mlx_lm_computes_the_same_from_what_we_save(tmp_path, kind, bits):
    def base() -> nn.Module:
        model = qwen3_model()
        if bits:
            nn.quantize(model, bits=bits)
        return model

    model = base()
    container = AdapterContainer.from_model(
        model, AdapterConfig(num_layers=1, kind=kind, rank=4, scale=3.0, keys=KEYS)
    )
    container.swap(trained(container))
    folder = container.save(tmp_path / "saved")
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapters.safetensors",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config == {
        "fine_tune_type": kind,
        "num_layers": 1,
        "lora_parameters": {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": KEYS[::-1]},
    }
    assert mx.allclose(from_mlx_lm(base(), folder)(TOKENS), model(TOKENS), atol=1e-5)


def test_mlx_lm_load_takes_the_folder_and_the_model_together(tmp_path, tiny):
    model, _ = load_model("tiny", dtype=mx.bfloat16)
    container = AdapterContainer.from_model(model, AdapterConfig(rank=4))
    container.swap(trained(container))
    folder = container.save(tmp_path)
    theirs, _ = mlx_lm.load(str(tiny), adapter_path=str(folder))
    base, _ = mlx_lm.load(str(tiny))
    theirs, ours, base = theirs(TOKENS), model(TOKENS), base(TOKENS)
    # All are in bfloat16: the difference is rounding, the change is not.
    assert float(mx.abs(theirs - ours).max()) < 0.3 < float(mx.abs(base - ours).max()) / 5


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_mlx_lm_saves_computes_the_same_here(tmp_path, kind):
    model = qwen3_model()
    parameters = {"rank": 4, "scale": 5.0, "dropout": 0.0, "keys": KEYS}
    linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
    tensors = {
        name: array + mx.random.normal(array.shape) * 0.1
        for name, array in tree_flatten(model.parameters(), destination={}).items()
        if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")
    }
    model.load_weights(list(tensors.items()), strict=False)
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    save_config(config | {"batch_size": 4, "iters": 100}, tmp_path / "adapter_config.json")
    ours = qwen3_model()
    container = AdapterContainer.from_directory(tmp_path).load(ours)
    assert mx.allclose(ours(TOKENS), model.eval()(TOKENS), atol=1e-5)
    assert container.config.rules[0].scale == 5.0 and container.version == 0


def test_many_ranks_and_scales_are_one_rank_and_scale_for_mlx_lm(tmp_path):
    model = qwen3_model()
    rules = [
        LoRARule(module_path=".*q_proj", rank=2, scale=0.5),
        LoRARule(module_path=r".*layers\.1.*up_proj", rank=5, scale=4.0),
        LoRARule(module_path=".*embed_tokens", rank=3, scale=1.0),
    ]
    container = AdapterContainer.from_model(model, AdapterConfig(rules=rules))
    container.swap(trained(container))
    folder = container.save(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 5 and config["lora_parameters"]["scale"] == 1
    # No set of paths inside blocks names just these modules, so they are whole paths.
    assert "model.layers.1.mlp.up_proj" in config["lora_parameters"]["keys"]
    for again in (from_mlx_lm(qwen3_model(), folder), loaded(qwen3_model(), folder)):
        assert mx.allclose(again(TOKENS), model(TOKENS), atol=1e-5)


def loaded(model: nn.Module, folder: Path) -> nn.Module:
    AdapterContainer.from_directory(folder).load(model)
    return model


def test_experts_are_saved_in_mlx_lms_own_axes(tmp_path):
    model = expert_model()
    config = AdapterConfig(rank=2, keys=["mlp.switch_mlp.up_proj", "self_attn.q_proj"])
    container = AdapterContainer.from_model(model, config)
    container.swap(trained(container))
    folder = container.save(tmp_path)
    assert mx.allclose(from_mlx_lm(expert_model(), folder)(TOKENS), model(TOKENS), atol=1e-5)


def test_a_folder_for_mlx_lm_keeps_version_and_base(tmp_path):
    model, container = adapted()
    container.version = 9
    adapter = read_adapter(container.save(tmp_path))
    assert adapter.version == 9 and adapter.fingerprint == base_fingerprint(model)
    assert peek_version(tmp_path / "adapters.safetensors") == 9


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            AdapterConfig(
                rules=[
                    LoRARule(module_path=".*q_proj", kind="dora"),
                    LoRARule(module_path=".*v_proj"),
                ]
            ),
            "one kind for all modules",
        ),
        (
            AdapterConfig(rules=[LoRARule(module_path=".*q_proj", bias=True)]),
            "adapters have no bias",
        ),
        (
            AdapterConfig(rules=[LoRARule(module_path=".*q_proj", weight_qtype="nf4")]),
            "base in NF4.*over_float_base=True",
        ),
    ],
)
def test_what_mlx_lm_cannot_load_is_refused_before_anything_is_written(config, message, tmp_path):
    model = qwen3_model()
    container = AdapterContainer.from_model(model, config)
    with pytest.raises(AdapterError, match=message):
        container.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_half_an_adapter_of_mlx_lm_is_refused(tmp_path):
    """mlx-lm itself takes a folder with one tensor of many, or with DoRA's lengths missing."""
    _model, container = adapted(config=AdapterConfig(kind="dora", rank=4, scale=2.0, keys=KEYS))
    folder = container.save(tmp_path)
    tensors = container.parameters()
    del tensors["model.layers.0.self_attn.q_proj.m"]
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj\.m: missing"):
        AdapterContainer.from_directory(folder).load(qwen3_model())


def test_whole_weights_of_mlx_lm_are_refused(tmp_path):
    _model, container = adapted()
    folder = container.save(tmp_path)
    tensors = container.parameters() | {"model.norm.weight": mx.ones((64,))}
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    with pytest.raises(AdapterError, match=r"model\.norm\.weight and 0 more tensors"):
        read_adapter(folder)


@pytest.mark.parametrize("text", ["{", "[1]", '{"lora_parameters": {"rnak": 4}}'])
def test_a_config_that_says_too_little_is_refused_with_its_folder(tmp_path, text):
    _model, container = adapted()
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), container.parameters())
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=str(tmp_path)):
        read_adapter(tmp_path)


def test_an_unknown_layout_is_refused(tmp_path):
    _model, container = adapted()
    with pytest.raises(ConfigError, match=r"layout is 'gguf'; expected one of \['mlx', 'peft'\]"):
        container.save(tmp_path, layout="gguf")


# Looking into them


@pytest.mark.parametrize("layout", ["file", "mlx", "peft"])
def test_an_adapter_is_inspected_without_its_model(tmp_path, layout):
    _model, container = adapted()
    container.version = 3
    where = tmp_path / "a.safetensors"
    if layout == "file":
        container.publish(where)
    else:
        where = container.save(tmp_path / layout, layout=layout)
    summary = inspect_adapter(where)
    tensors = container.parameters().values()
    assert summary.version == 3 and summary.fingerprint == container.fingerprint
    assert summary.parameters == sum(array.size for array in tensors)
    assert summary.bytes == 4 * summary.parameters and list(summary.dtypes) == ["float32"]
    assert [module.path for module in summary.modules] == sorted(container.layers())
    assert {(m.kind, m.rank, m.scale) for m in summary.modules} == {("lora", 4, 2.0)}
    assert "version 3" in str(summary) and "mlp.up_proj" in str(summary)


def test_inspecting_names_numbers_that_are_none(path):
    model, container = adapted()
    layer = model.layers[0].mlp.up_proj
    layer.lora_b = layer.lora_b * mx.inf
    container.publish(path)
    assert inspect_adapter(path).not_finite == ["model.layers.0.mlp.up_proj.lora_b"]


def test_the_command_shows_an_adapter_and_fails_if_its_numbers_are_none(path, capsys):
    model, container = adapted()
    container.publish(path)
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "version 0" in shown and "model.layers.1.mlp.up_proj" in shown
    layer = model.layers[0].mlp.up_proj
    layer.lora_b = layer.lora_b * mx.nan
    container.publish(path)
    assert main(["inspect", str(path), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["not_finite"] == ["model.layers.0.mlp.up_proj.lora_b"]
    assert main(["inspect", str(path.parent / "none")]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("inside", [".", "adapters"])
def test_the_folder_of_a_run_is_answered_with_the_files_of_its_adapters(tmp_path, inside):
    folder = tmp_path / "adapters"
    folder.mkdir()
    for name in ("best", "latest"):
        (folder / f"{name}.safetensors").touch()
    with pytest.raises(AdapterError) as caught:
        AdapterContainer.from_directory(tmp_path / inside)
    files = f"{folder / 'best.safetensors'} or {folder / 'latest.safetensors'}"
    assert str(caught.value).endswith(f"To load its adapters, pass one of the files: {files}")
