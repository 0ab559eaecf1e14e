"""Reports: exact bytes, errors against an independent computation, stable JSON, a self-contained page."""

import io
import json
import math
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxcomp.core.report import SCHEMA, Report, human_bytes, report
from jaxcomp.core.transform import compress
from jaxcomp.formats import Grid, QuantizedArray
from jaxcomp.quantize import rtn


def tree():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    block = lambda: {"up": {"kernel": jax.random.normal(next(keys), (64, 32)), "bias": jnp.zeros(32)}}
    return {"embed": {"embedding": jax.random.normal(next(keys), (10, 64))}, "blocks_0": block(), "blocks_1": block()}


@pytest.fixture(scope="module")
def pair():
    before = tree()
    return before, compress(rtn(3, group_size=16), before)[0]


def test_rows_have_exact_bytes_and_true_errors(pair):
    before, after = pair
    result = report(before, after, seconds=1.5)
    assert [leaf.path for leaf in result.leaves] == ["blocks_0/up/kernel", "blocks_1/up/kernel"]
    row = result.leaves[1]
    packed, scales = 32 * 6 * 4, 32 * 4 * 4  # 64 codes of 3 bits are six words of a row; four groups
    assert (row.bytes_before, row.bytes_after) == (64 * 32 * 4, packed + scales)
    assert row.bits_per_weight == 8 * (packed + scales) / (64 * 32) == result.bits_per_weight
    w, q = (np.asarray(x, np.float64) for x in (before["blocks_1"]["up"]["kernel"], materialised(after)))
    error = np.linalg.norm(q - w) / np.linalg.norm(w)
    assert row.relative_error == pytest.approx(error, rel=1e-5)
    assert row.sqnr_db == pytest.approx(-20 * math.log10(error), rel=1e-5)
    assert (row.kind, row.shape, result.seconds) == ("quantized", (64, 32), 1.5)


def materialised(after):
    return after["blocks_1"]["up"]["kernel"].materialise()


def test_totals_add_up(pair):
    before, after = pair
    result = report(before, after)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(t)) for t in pair]
    assert [result.bytes_before, result.bytes_after] == sizes
    assert result.ratio == sizes[0] / sizes[1]
    assert result.untouched_bytes == 10 * 64 * 4 + 2 * 32 * 4


def test_equal_copies_are_untouched_and_changed_arrays_are_not(pair):
    before, _ = pair
    copy = jax.tree.map(jnp.array, before)
    assert report(before, copy).leaves == ()
    copy["blocks_0"]["up"]["kernel"] = before["blocks_0"]["up"]["kernel"] * 1.5
    copy["embed"]["embedding"] = before["embed"]["embedding"].astype(jnp.bfloat16)
    by_path = {leaf.path: leaf for leaf in report(before, copy).leaves}
    assert by_path.keys() == {"embed/embedding", "blocks_0/up/kernel"}
    assert by_path["blocks_0/up/kernel"].relative_error == pytest.approx(0.5)
    assert by_path["embed/embedding"].bits_per_weight == 16 and by_path["embed/embedding"].kind == "array"


def test_errors_are_measured_against_the_reference(pair):
    before, _ = pair
    moved = jax.tree.map(lambda x: x * 4, before)  # as a rescaling before quantization
    after = compress(rtn(8), moved)[0]
    assert report(before, after).leaves[0].relative_error > 2
    assert report(before, after, reference=moved).leaves[0].relative_error < 0.01


def test_exact_removed_added_and_reshaped_leaves():
    w = jnp.array([[1.0, -1.0, 3.0], [0.0, 2.0, 3.0]])
    exact = QuantizedArray.quantize(w, Grid(3), (1,))  # scale 1: whole numbers in -4..3 are exact
    before = {"same": w, "gone": w, "wide": w}
    after = {"same": exact, "wide": w[:1], "new": w}
    rows = {leaf.path: leaf for leaf in report(before, after).leaves}
    assert rows["same"].relative_error == 0 and rows["same"].sqnr_db is None
    assert (rows["gone"].kind, rows["gone"].bytes_after) == ("removed", 0)
    assert (rows["new"].kind, rows["new"].bytes_before) == ("added", 0)
    assert rows["wide"].relative_error is None
    assert "exact" in rendered(report(before, after))


def rendered(result: Report, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(result.table())
    return console.file.getvalue()


def test_table_fits_eighty_columns(pair):
    text = rendered(report(*pair))
    assert "blocks_0/up" in text and "2 changed leaves" in text and "untouched" in text
    assert max(map(len, text.splitlines())) <= 80


def test_json_is_stable_and_comes_back(pair):
    result = report(*pair, seconds=2.0).with_sections(settings={"bits": 3}, seeds=[0, 1])
    body = json.loads(result.to_json())
    assert list(body) == ["schema", "totals", "leaves", "sections"] and body["schema"] == SCHEMA
    assert body["totals"]["bytes_after"] == result.bytes_after
    assert Report.from_json(result.to_json()) == result
    with pytest.raises(ValueError, match="expected schema"):
        Report.from_json(json.dumps(body | {"schema": "other"}))


def test_numbers_that_json_lacks_are_refused(pair):
    with pytest.raises(ValueError, match="JSON"):
        report(*pair).with_sections(bad=float("nan")).to_json()


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#")]


def test_page_is_self_contained_and_escaped(pair):
    perplexity = [
        {"name": "<b>float</b>", "value": 50.0, "low": 48.0, "high": 52.0},
        {"name": "compressed", "value": 55.0, "low": 53.0, "high": 57.0},
    ]
    result = report(*pair, seconds=1.0).with_sections(perplexity=perplexity, settings={"seed": 0}, note="x < y & z")
    text = result.to_html("A <title>")
    page = Page(text)
    assert page.tags.count("svg") == 4  # perplexity, SQNR, heat map, bytes
    assert not page.links and "script" not in page.tags and "link" not in page.tags
    assert "<b>float" not in text and "A &lt;title&gt;" in text and "x &lt; y &amp; z" in text
    assert "blocks_1/up/kernel" in text
    assert text == result.to_html("A <title>")


def test_page_of_many_leaves_without_blocks_or_sections():
    w = jnp.ones((4, 8))
    before = {f"layer{'x' * i}": {"kernel": w} for i in range(70)}
    after = compress(rtn(4), before)[0]
    assert Page(report(before, after).to_html()).tags.count("svg") == 1
    assert Page(report(before, before).to_html()).tags.count("svg") == 0


def test_dollar_signs_in_paths_are_no_mathematics():
    before = {"blocks_0": {"a$b$": {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}}}
    assert "a$b$" in report(before, compress(rtn(4), before)[0]).to_html()


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**31, "2.0 GiB"), (2**42, "4096.0 GiB")]
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


def test_one_leaf_is_dense_at_a_time(monkeypatch, pair):
    """Errors are computed inside one jitted program per leaf: nothing dense comes out of it."""
    sizes = []
    original = QuantizedArray.materialise
    monkeypatch.setattr(QuantizedArray, "materialise", lambda self: sizes.append(type(self.packed)) or original(self))
    before = tree()
    jax.clear_caches()
    report(before, compress(rtn(5), before)[0])
    assert sizes and all(issubclass(kind, jax.core.Tracer) for kind in sizes)
