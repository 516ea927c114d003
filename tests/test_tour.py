"""docs/tour.ipynb runs from its first cell to its last; what is stored in it is such a run."""

import re

import pytest

from tests import ROOT
from tests.conftest import link_code

nbformat = pytest.importorskip("nbformat")
PATH = ROOT / "docs" / "tour.ipynb"


def outputs(notebook):
    """Returns the outputs of all code cells."""
    return [out for cell in notebook.cells for out in cell.get("outputs", ())]


def pictures(notebook):
    return [out for out in outputs(notebook) if "image/png" in out.get("data", {})]


def text_of(notebook):
    return "".join(out.get("text", "") for out in outputs(notebook))


def test_it_runs_in_an_empty_folder_on_toy_sizes(tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("TOUR_MINUTES", "0.05")
    monkeypatch.setenv("TOUR_DOCUMENTS", "300")
    notebook = nbformat.read(PATH, as_version=4)
    folder = {"metadata": {"path": str(link_code(tmp_path))}}
    settings = {"timeout": 300, "startup_timeout": 300, "kernel_name": "python3"}
    client.NotebookClient(notebook, resources=folder, **settings).execute()
    assert len(pictures(notebook)) == 3
    text = text_of(notebook)
    assert not re.search("^error: ", text, re.M), text
    for kind in ("pretrain", "sft"):
        assert (tmp_path / "checkpoints" / kind / "tour" / "final" / "model.safetensors").is_file()


def test_the_outputs_in_it_are_those_of_a_whole_run():
    notebook = nbformat.read(PATH, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    assert len(pictures(notebook)) == 3
    text = text_of(notebook)
    assert re.search(r"eval +\d+ \| val_loss", text)
    assert not re.search("^error: |Traceback", text, re.M)
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)  # nobody's machine
