"""The result of a supervised run names the alarms that the run has reported."""

from itertools import count

import textpolicy as tp
from textpolicy.machine import MemoryPressure, memory_bytes


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
