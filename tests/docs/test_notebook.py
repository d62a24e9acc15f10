"""The notebook runs from its first cell to its last, and is stored without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "train_plot_compare.ipynb"
SECONDS = 300  # It takes half a minute on two cores, and longer on a busy machine.


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(one.text for one in cell.outputs if one.output_type == "stream")


@pytest.mark.slow
def test_the_notebook_trains_plots_and_compares(monkeypatch, tmp_path):
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": tmp_path}})
    client.execute()
    said = [printed(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert "gold highest   ok" in said[1]
    assert said[2].count("held-out reward") == 2
    pictures = [one for cell in notebook.cells for one in cell.get("outputs", []) if "data" in one]
    assert any("image/png" in one.data for one in pictures)
    assert "95 % interval" in said[4]


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
