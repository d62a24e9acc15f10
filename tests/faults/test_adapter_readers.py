"""An adapter file that another process replaces as fast as it can is always read whole."""

import subprocess
import sys

import pytest

from textpolicy.adapters import AdapterWatcher, peek_version, read_adapter

READS, WRITES = 4500, 905
WRITER = """
import mlx.core as mx
import sys
from itertools import count
from pathlib import Path
from textpolicy.adapters import Adapter, AdapterConfig
from textpolicy.adapters.files.adapter_file import write_adapter_file
path, least, stop = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
for version in count(1):
    arrays = {f"layer.{name}": mx.full((64, 64), version) for name in ("lora_a", "lora_b")}
    config = AdapterConfig(rank=4)
    write_adapter_file(path, Adapter(origin="", arrays=arrays, config=config, version=version))
    if version == 1:
        print("ready", flush=True)
    if version >= least and stop.exists():
        break
print(version)
"""


@pytest.mark.proves("F4")
@pytest.mark.slow
def test_a_reader_beside_a_writer_sees_whole_versions_that_only_grow(tmp_path, attempts):
    path, stop = tmp_path / "adapters.safetensors", tmp_path / "stop"
    watcher = AdapterWatcher(path)
    command = [sys.executable, "-c", WRITER, str(path), str(WRITES), str(stop)]
    versions: list[int] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "ready\n"
        while writer.poll() is None:
            adapter = read_adapter(path)
            values = {float(end) for a in adapter.arrays.values() for end in (a.min(), a.max())}
            assert values == {float(adapter.version)}
            versions.append(adapter.version)
            attempts.add()
            assert peek_version(path) >= adapter.version
            if len(versions) == READS:
                stop.touch()
        last = int(writer.stdout.read())
    assert writer.returncode == 0
    assert versions == sorted(versions)
    assert len(versions) >= READS and last >= WRITES and len(set(versions)) > 50
    assert read_adapter(watcher.poll()).version == last
