"""The tolerances of exports: those on the page are those of the code."""

import re
from pathlib import Path

from textpolicy.export import proof, tolerances

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")


def test_the_page_states_the_tolerances():
    rows = re.findall(r"^\| (adapter|merged [^|]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    stated = {what: float(allowed) for what, allowed, _ in rows}
    assert stated == {
        "adapter": tolerances.FLOAT32,
        **{f"merged {name}": allowed for name, allowed in tolerances.MERGED.items()},
        "merged into a quantized base": tolerances.QUANTIZED,
    }
    assert all(float(measured) < float(allowed) / 3 for _, allowed, measured in rows)
    assert f"above {proof.MERGED_TOLERANCE:g} |" in PAGE
