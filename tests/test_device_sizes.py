"""The sizes of the device: the rule, the kept measurement, and that computations follow them."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.models.qwen3 import Qwen3Model

import textpolicy as tp
from tests.devices import only_on_a_cpu
from tests.training.rows import groups_of
from textpolicy import device_sizes as module
from textpolicy.config import SFTConfig, TrainConfig, changed, read_toml
from textpolicy.device_sizes import (
    DeviceSizes,
    device_sizes,
    measure_saturating_rows,
    read_or_measure,
    saturating_rows,
    sizes_of,
    use_sizes,
    using_sizes,
)
from textpolicy.errors import ConfigError
from textpolicy.experiment import preflight
from textpolicy.experiment.preflight import with_sizes_that_fit
from textpolicy.experiment.run_size import SizeEstimator
from textpolicy.experiment.workers import BuildRunWorker
from textpolicy.generation.policy import ModelPolicy
from textpolicy.planning.memory_plan import plan_memory
from textpolicy.ranks import ALONE
from textpolicy.training.batch import split_into_micro_batches, training_rows
from textpolicy.training.dealing import deal_micro_batches
from textpolicy.training.output_head import OutputHead, find_output_head
from textpolicy.types import Sampling

MIB, GB = 2**20, 10**9
DEVICE = {"device": "NVIDIA H100 80GB HBM3", "mlx": "0.30"}
RUN = {
    "task": {"env": "add"},
    "run": {"steps": 1},
    "rollout": {"groups_per_step": 2, "group_size": 4},
    "evaluation": {"count": 2},
}


def sizes(tokens, rows, prefill, head) -> DeviceSizes:
    return DeviceSizes(
        micro_batch_tokens=tokens,
        decoding_rows=rows,
        prefill_tokens=prefill,
        head_chunk_bytes=head * MIB,
    )


@pytest.fixture(autouse=True)
def no_sizes_in_use():
    """Let the sizes of the device count, which a worker of an earlier test may have replaced."""
    use_sizes(None)
    yield
    use_sizes(None)


@pytest.fixture
def device(monkeypatch):
    """Return a function that gives this process a device with so many rows and so much memory."""

    def pretend(rows: int, memory: float) -> None:
        monkeypatch.setattr(module, "memory_bytes", lambda: int(memory))
        monkeypatch.setattr(module, "saturating_rows", lambda: SimpleNamespace(rows=rows))

    return pretend


@pytest.mark.parametrize(
    ("rows", "memory", "expected"),
    [
        pytest.param(64, 8 * GB, sizes(1024, 256, 2048, 16), id="CPU of 8 GB"),
        pytest.param(256, 1000 * GB, sizes(1024, 256, 2048, 16), id="CPU of 1 TB"),
        pytest.param(256, 4 * GB, sizes(512, 128, 1024, 8), id="CPU of 4 GB"),
        pytest.param(256, 10**6, sizes(128, 32, 256, 2), id="smallest sizes"),
        pytest.param(1024, 5.7 * GB, sizes(1024, 256, 2048, 16), id="Mac of 8 GB"),
        pytest.param(1024, 103 * GB, sizes(4096, 1024, 8192, 64), id="Mac of 128 GB"),
        pytest.param(1024, 12 * GB, sizes(2048, 256, 4096, 32), id="Mac of 16 GB"),
        pytest.param(4096, 84 * GB, sizes(16384, 1024, 32768, 256), id="H100"),
    ],
)
def test_sizes_grow_with_the_rows_that_the_device_needs_and_with_its_memory(rows, memory, expected):
    assert DeviceSizes.of(rows, int(memory)) == expected


def test_a_little_more_memory_or_less_changes_no_size():
    assert len({DeviceSizes.of(1024, int(gb * GB)) for gb in (83, 85, 96, 110, 150)}) == 1
    assert DeviceSizes.of(1500, 84 * GB) == DeviceSizes.of(1024, 84 * GB)


@only_on_a_cpu("of a CPU")
def test_a_cpu_is_not_timed_and_has_the_sizes_that_were_measured_on_cpus(monkeypatch):
    monkeypatch.setattr(module, "measure_saturating_rows", None)
    monkeypatch.setattr(module, "memory_bytes", lambda: 8 * GB)
    assert saturating_rows().source == "known for CPUs"
    assert device_sizes() == DeviceSizes() == sizes(1024, 256, 2048, 16)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Let this process believe that it has a GPU of 84 GB whose products were never timed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    info = {"device_name": DEVICE["device"], "total_memory": 84 * GB}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    monkeypatch.setattr(module, "memory_bytes", lambda: 84 * GB)
    module._measured_once.cache_clear()
    yield
    module._measured_once.cache_clear()


def test_a_gpu_is_timed_once_by_all_threads_and_not_again_by_another_process(monkeypatch, gpu):
    timed: list[int] = []

    def measure() -> int:
        timed.append(1)
        time.sleep(0.05)
        return 4096

    monkeypatch.setattr(module, "measure_saturating_rows", measure)
    with ThreadPoolExecutor(4) as threads:
        found = [*threads.map(lambda _: device_sizes(), range(8))]
    assert found == [sizes(16384, 1024, 32768, 256)] * 8
    assert len(timed) == 1
    module._measured_once.cache_clear()  # as in another process
    monkeypatch.setattr(module, "measure_saturating_rows", never)
    assert device_sizes() == sizes(16384, 1024, 32768, 256)


@pytest.mark.parametrize("busy_from", [64, 256, 1024, 8192])
def test_the_fewest_rows_that_nearly_reach_the_highest_rate_are_found(busy_from):
    # Up to these rows, a product takes the same time.
    assert measure_saturating_rows(lambda rows: max(rows, busy_from) * 1e-6) == busy_from


def test_products_of_this_machine_can_be_timed():
    assert measure_saturating_rows() in {2**n for n in range(6, 14)}


def never():
    raise AssertionError("measured again")


def test_a_measurement_is_kept_and_a_value_in_the_file_wins(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = read_or_measure(DEVICE, lambda: 2048)
    (path,) = (tmp_path / "textpolicy").iterdir()
    assert first.source == f"measured now, and kept in {path}"
    again = read_or_measure(DEVICE, never)
    assert (again.rows, again.source) == (2048, f"kept in {path}")
    path.write_text(json.dumps({**DEVICE, "saturating_rows": 512}))
    assert read_or_measure(DEVICE, never).rows == 512
    assert read_or_measure(DEVICE | {"mlx": "0.31"}, lambda: 1024).rows == 1024
    assert len([*path.parent.iterdir()]) == 2


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "\x00", "null", json.dumps({**DEVICE})),
        *(json.dumps({**DEVICE, "saturating_rows": n}) for n in (0, -1, "512", 10**9, True, 1.5)),
        json.dumps({**DEVICE, "device": "another", "saturating_rows": 512}),
    ],
)
def test_a_damaged_or_foreign_file_is_measured_and_written_again(monkeypatch, tmp_path, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read_or_measure(DEVICE, lambda: 2048)
    (path,) = (tmp_path / "textpolicy").iterdir()
    path.write_text(content)
    assert read_or_measure(DEVICE, lambda: 1024).rows == 1024
    assert read_or_measure(DEVICE, never).rows == 1024


def test_without_a_folder_to_write_in_the_rows_are_measured_and_not_kept(monkeypatch, tmp_path):
    (tmp_path / "textpolicy").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = read_or_measure(DEVICE, lambda: 2048)
    assert found.rows == 2048
    assert found.source.startswith("measured now, and not kept: ")


def test_the_sizes_of_a_run_are_those_that_were_set_and_else_those_of_the_device(device):
    device(1024, 103 * GB)
    config = changed(TrainConfig(), {"sizes.decoding_rows": 8})
    assert sizes_of(config.sizes) == replace(sizes(4096, 1024, 8192, 64), decoding_rows=8)
    assert sizes_of(SFTConfig().sizes) == device_sizes()
    with using_sizes(sizes_of(config.sizes)):
        assert device_sizes().decoding_rows == 8
    assert device_sizes().decoding_rows == 1024


def test_a_size_of_zero_is_refused():
    with pytest.raises(ConfigError, match=r"decoding_rows is 0; expected .*at least 1"):
        changed(TrainConfig(), {"sizes.decoding_rows": 0})


@pytest.mark.parametrize(("fitting", "expected"), [(10**9, 16384), (4096, 4096), (1, 1024)])
def test_sizes_are_halved_until_the_run_fits_but_not_below_those_of_a_cpu(
    device, monkeypatch, fitting, expected
):
    device(4096, 84 * GB)
    monkeypatch.setattr(preflight, "memory_bytes", lambda: fitting)
    monkeypatch.setattr(
        SizeEstimator,
        "estimate",
        lambda self, config: SimpleNamespace(memory_bytes=config.sizes.micro_batch_tokens),
    )
    estimator = object.__new__(SizeEstimator)
    config = changed(TrainConfig(), {"sizes.head_chunk_bytes": 7 * MIB})
    fitted = with_sizes_that_fit(config, estimator).sizes
    assert fitted.micro_batch_tokens == expected
    assert fitted.head_chunk_bytes == 7 * MIB
    assert fitted.decoding_rows == max(256, expected // 16)
    halved = with_sizes_that_fit(config, estimator, processes=2).sizes
    assert halved.micro_batch_tokens == {16384: 16384, 4096: 2048, 1024: 1024}[expected]


def test_on_a_small_machine_no_size_is_halved_any_further():
    small = DeviceSizes.of(256, 2 * GB)
    assert small.halved == small


def test_blocks_that_end_in_another_order_leave_no_sizes_behind():
    """Runs in threads of one process may overlap."""
    first, second = using_sizes(sizes(4096, 256, 2048, 16)), using_sizes(sizes(260, 256, 2048, 16))
    before = device_sizes()
    first.__enter__()
    second.__enter__()
    assert device_sizes() == sizes(260, 256, 2048, 16)
    first.__exit__(None, None, None)
    assert device_sizes() == sizes(260, 256, 2048, 16)
    use_sizes(sizes(300, 256, 2048, 16))
    assert device_sizes() == sizes(260, 256, 2048, 16)
    second.__exit__(None, None, None)
    assert device_sizes() == sizes(300, 256, 2048, 16)
    use_sizes(None)
    assert device_sizes() == before


def test_micro_batches_and_their_deal_follow_the_sizes():
    rows = training_rows(groups_of(*[(60, [100, 40])] * 8))
    with using_sizes(DeviceSizes()):
        assert [len(part) for part in split_into_micro_batches(rows, None)] == [6, 6, 4]
    with using_sizes(sizes(4096, 256, 2048, 16)):
        assert [len(part) for part in split_into_micro_batches(rows, None)] == [16]
        assert len(deal_micro_batches(rows, None, ALONE).parts) == 1
    with using_sizes(sizes(260, 256, 2048, 16)):
        assert {len(part) for part in split_into_micro_batches(rows, None)} == {2}
        assert len(deal_micro_batches(rows, None, ALONE).parts) == 8


@pytest.fixture
def forward_shapes(monkeypatch):
    """Return the shapes of all tokens that models read from now on."""
    shapes: list[tuple[int, ...]] = []
    forward = Qwen3Model.__call__

    def record(self, inputs, *arguments, **named):
        shapes.append(inputs.shape)
        return forward(self, inputs, *arguments, **named)

    monkeypatch.setattr(Qwen3Model, "__call__", record)
    return shapes


def test_prompts_are_read_and_rows_decoded_by_the_sizes(load_tiny, forward_shapes):
    policy = ModelPolicy(*load_tiny(), Sampling(max_tokens=3), seed=0)
    prompts = ["one and two and three and four " * 20, "five and six and seven " * 20]

    def most(sizes):
        forward_shapes.clear()
        with using_sizes(sizes):
            policy.generate(prompts, n=4)
        read = max(rows * length for rows, length in forward_shapes if length > 1)
        return read, max(rows for rows, length in forward_shapes if length == 1)

    wide = most(DeviceSizes())
    assert wide[0] > 128
    assert wide[1] == 8
    narrow = most(sizes(1024, 4, 64, 16))
    assert narrow[0] <= 66  # The last chunk takes a token more than the rest would leave alone.
    assert narrow[1] == 4


def test_chunks_of_the_output_head_follow_the_sizes(load_tiny, monkeypatch):
    model, _ = load_tiny()
    head = find_output_head(model)
    assert head
    hidden = head.body(mx.zeros((1, 100), mx.int32))[0]
    vocabulary = head.project(hidden[:1]).shape[-1]
    rows: list[int] = []
    project = OutputHead.project

    def record(self, hidden):
        rows.append(len(hidden))
        return project(self, hidden)

    monkeypatch.setattr(OutputHead, "project", record)
    tokens, temperature = mx.zeros(100, mx.int32), mx.ones(100)
    whole, _ = head.logprobs(hidden, tokens, temperature)
    assert max(rows) == 100
    rows.clear()
    with using_sizes(replace(DeviceSizes(), head_chunk_bytes=4 * vocabulary * 10)):
        cut, _ = head.logprobs(hidden, tokens, temperature)
    assert max(rows) == 10
    assert mx.allclose(whole, cut, atol=1e-5)


def test_the_memory_plan_follows_the_sizes():
    model = json.loads((Path(module.__file__).parent / "tiny" / "config.json").read_text())
    step = {"batch": 4096, "group_size": 8, "prompt_tokens": 100, "completion_tokens": 50}
    base = plan_memory(model, **step, sizes=DeviceSizes())
    more = plan_memory(model, **step, sizes=sizes(4096, 512, 4096, 32)).peaks
    assert all(more[phase] > 1.5 * base.peaks[phase] for phase in more)
    with using_sizes(sizes(4096, 512, 4096, 32)):
        assert plan_memory(model, **step).peaks == more


def silent(event):
    return None


def test_a_run_works_with_its_sizes_and_keeps_them_when_it_is_resumed(
    device, tmp_path, forward_shapes
):
    device(1024, 103 * GB)
    config = RUN | {"sizes": {"decoding_rows": 4}}
    tp.run(config, output=tmp_path / "run", on_event=silent)
    kept = read_toml(tmp_path / "run" / "config.toml", TrainConfig()).sizes
    assert asdict(kept) == asdict(replace(sizes(4096, 1024, 8192, 64), decoding_rows=4))
    assert max(rows for rows, length in forward_shapes if length == 1) <= 4
    # Another device, or another measurement of this one.
    device(4096, 84 * GB)
    more = changed(TrainConfig(), {f"{s}.{n}": v for s, own in RUN.items() for n, v in own.items()})
    more = changed(more, {"run.steps": 2, "run.output": tmp_path / "run"})
    forward_shapes.clear()
    tp.run(more, resume=tmp_path / "run", on_event=silent)
    assert read_toml(tmp_path / "run" / "config.toml", TrainConfig()).sizes == kept
    assert max(rows for rows, length in forward_shapes if length == 1) <= 4
    with pytest.raises(ConfigError, match=r"sizes.decoding_rows: 4 before, 8 now"):
        tp.run({"sizes": {"decoding_rows": 8}}, resume=tmp_path / "run", on_event=silent)
    assert device_sizes() == sizes(16384, 1024, 32768, 256)


def test_a_worker_works_with_the_sizes_of_its_run(device):
    given = {"task.env": "add", "sizes.micro_batch_tokens": 100, "sizes.prefill_tokens": 50}
    device(256, 8 * GB)
    BuildRunWorker(changed(TrainConfig(), given))()
    assert device_sizes() == sizes(100, 256, 50, 16)
