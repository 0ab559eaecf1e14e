"""Every notebook runs from its first cell to its last."""

import pathlib

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "experiments" / "notebooks").glob("*.ipynb"))
SAYS = {"compress_a_model": "accuracy", "upscale_a_picture": "kB of weights; bicubic"}
SAYS |= {
    "caching_a_sampler": "30 dB or better",
    "sparse_attention": "largest difference at threshold 0",
}  # its cells print


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit notebooks without outputs"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    text = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "materialised" not in text and SAYS[path.stem] in text
