"""The limits of a Mac's memory, and the pressure that the system reports."""

import struct
from pathlib import Path

import mlx.core as mx
import pytest

from textpolicy.machine import (
    MemoryLimits,
    MemoryPressure,
    keep_memory_in_bounds,
    memory_bytes,
    with_busy_note,
)

# What a Mac with 16 GB reports.
RECOMMENDED = 12_713_115_648
GB = 10**9


@pytest.mark.parametrize(
    ("in_use", "wired"),
    [
        (GB // 2, 1.5 * GB),
        (8 * GB, 10 * GB),
        (11 * GB, 0.9 * RECOMMENDED),
        (40 * GB, 0.9 * RECOMMENDED),
    ],
)
def test_the_model_is_wired_with_a_margin_and_never_all_of_the_machine(in_use, wired):
    limits = MemoryLimits.of_a_mac(RECOMMENDED, in_use)
    assert limits.wired == pytest.approx(wired, rel=1e-6) and limits.wired < RECOMMENDED
    assert limits.used == RECOMMENDED
    assert limits.cache == max(RECOMMENDED - in_use, 0) // 2


@pytest.fixture
def mac(monkeypatch):
    """Let mlx describe the device of a Mac with 16 GB."""
    info = {"max_recommended_working_set_size": RECOMMENDED, "memory_size": 2**34}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))


def limits_now() -> list[int]:
    """Return mlx's limits, which can be read only by setting them."""
    setters = [mx.set_memory_limit, mx.set_cache_limit, mx.set_wired_limit]
    values = [setter(0) for setter in setters]
    for setter, value in zip(setters, values, strict=True):
        setter(value)
    return values


def test_a_run_on_a_mac_has_limits_and_leaves_them_as_they_were(mac):
    before = limits_now()
    with pytest.raises(KeyError), keep_memory_in_bounds():
        inside = limits_now()
        assert inside[0] == RECOMMENDED and inside != before
        assert inside[1] <= RECOMMENDED // 2
        raise KeyError
    assert limits_now() == before


def test_other_devices_keep_their_limits():
    before = limits_now()
    with keep_memory_in_bounds():
        assert limits_now() == before


def test_a_run_on_a_mac_may_need_what_the_device_recommends_and_no_more(mac):
    assert memory_bytes() <= RECOMMENDED


def test_swap_and_pressure_are_read_from_what_macos_says():
    usage = struct.pack("=QQQIi", 3 * 2**30, 2**30, 2**31, 16384, 1)
    normal, critical = struct.pack("=i", 1), struct.pack("=i", 4)
    assert MemoryPressure.of_mac(usage, normal) == MemoryPressure(2**31, warned=False)
    assert MemoryPressure.of_mac(usage, critical).warned
    assert MemoryPressure.of_mac(b"", b"") == MemoryPressure(0)


def test_swap_is_read_from_what_linux_says():
    text = "MemFree: 1 kB\nSwapCached: 5 kB\nSwapTotal:    2048 kB\nSwapFree:     1024 kB\n"
    assert MemoryPressure.of_meminfo(text) == MemoryPressure(2**20)
    assert MemoryPressure.of_meminfo("MemFree: 1 kB\n") == MemoryPressure(0)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux has this file")
def test_the_pressure_of_this_machine_can_be_read():
    assert MemoryPressure.now().swapped >= 0 and not MemoryPressure.now().warned


@pytest.mark.parametrize(
    ("load", "cores", "note"),
    [
        (0.9, 2, ""),
        (5.51, 2, ". The machine is busy now (load 5.5 on 2 cores), so this time may change"),
        (3.0, 10, ""),
        (8.0, 10, ". The machine is busy now (load 8.0 on 10 cores), so this time may change"),
    ],
)
def test_a_load_of_half_the_cores_or_more_is_told_beside_a_time(monkeypatch, load, cores, note):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert with_busy_note("about 3 s") == f"about 3 s{note}"


def test_without_a_load_average_nothing_is_said(monkeypatch):
    def fail():
        raise OSError("not known")

    monkeypatch.setattr("os.getloadavg", fail)
    assert with_busy_note("about 3 s") == "about 3 s"
