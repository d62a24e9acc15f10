"""A supervised run reports alarms and the time left, and its result names the alarms."""

from itertools import count

import textpolicy as tp
from textpolicy.machine import MemoryPressure, memory_bytes
from textpolicy.tracking.run_history import format_duration


def test_a_supervised_run_that_swaps_returns_its_alarm(tmp_path, monkeypatch):
    rows = [f'{{"prompt": "{n}+{n}=", "completion": "{2 * n}"}}\n' for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    swapped = count(0, memory_bytes())
    monkeypatch.setattr(MemoryPressure, "now", lambda: MemoryPressure(next(swapped)))
    events = []
    result = tp.run(
        {
            "data": {"source": str(tmp_path / "rows.jsonl")},
            "trainer": {"iterations": 2, "batch_size": 2},
            "run": {"steps_per_report": 1},
        },
        output=tmp_path / "run",
        on_event=events.append,
    )
    reported = [event.text for event in events if event.kind == "alarm"]
    assert len(reported) == 1 and "memory" in reported[0]
    assert list(result.alarms) == reported
    # The time left is that of one more update, and then of none, at the measured speed.
    steps = [event for event in events if event.kind == "step"]
    one_more = format_duration(1 / steps[0].metrics["iterations_per_second"])
    assert [event.text.rpartition(", ")[2] for event in steps] == [f"{one_more} left", "0:00 left"]
