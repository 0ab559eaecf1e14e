"""The README tells the truth: its table is the card's, its tree is the repository's, its commands are marked for CI."""

import re

import pytest

from experiments.cards import Card, Row
from experiments.readme_table import BASELINES, ROOT, TABLES, render, with_table

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_the_cards():
    present = [table for table in TABLES if table.marks[0] in README]
    assert BASELINES in present
    for table in present:
        assert with_table(README, table.read(), table) == README


def test_lost_marks_are_an_error():
    with pytest.raises(ValueError, match="expected the lines"):
        with_table(README.replace(BASELINES.marks[0], ""), BASELINES.read(), BASELINES)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_table_shows_what_its_card_has(table):
    (heading, setting), (label, method, metric) = table.columns[1], table.sizes[0]
    rows = [Row(method, setting, table.metric, "", 2.0, 1.5, 2.5), Row(method, setting, metric, "", 0.5, 0.5, 0.5)]
    card = Card("toy", "a paper", "a command", "abc", "cpu", 1.0, [0], rows)
    lines = render(table, card).splitlines()
    assert heading in lines[0]
    assert lines[2] == f"| {method} | - | 2.00 [1.50, 2.50]" + " | -" * (len(table.columns) - 2) + " |"
    assert any(line.startswith(f"| {label} | - | 0.50 | -") for line in lines)


def test_file_tree_names_every_package():
    packages = {p.parent.name for p in (ROOT / "jaxcomp").glob("*/__init__.py")}
    tree = README.split("```\njaxcomp/\n")[1].split("```")[0]
    named = set(re.findall(r"^  (\w+)/", tree, re.M))
    assert packages == named


def test_commands_are_marked_for_ci():
    for mark in ("main", "tests"):
        assert re.search(rf"<!-- {mark} -->\n```bash\npip install .*\n.*\n```", README), mark
