"""The README tells the truth: its table is the card's, its tree is the repository's, its commands are marked for CI."""

import re

import pytest

from experiments.cards import Card
from experiments.readme_table import BEGIN, CARD, ROOT, with_table

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_is_the_cards():
    assert with_table(README, Card.from_json(CARD.read_text(encoding="utf-8"))) == README


def test_lost_marks_are_an_error():
    with pytest.raises(ValueError, match="expected the lines"):
        with_table(README.replace(BEGIN, ""), Card.from_json(CARD.read_text(encoding="utf-8")))


def test_file_tree_names_every_package():
    packages = {p.parent.name for p in (ROOT / "jaxcomp").glob("*/__init__.py")}
    tree = README.split("```\njaxcomp/\n")[1].split("```")[0]
    named = set(re.findall(r"^  (\w+)/", tree, re.M))
    assert packages == named


def test_commands_are_marked_for_ci():
    for mark in ("main", "tests"):
        assert re.search(rf"<!-- {mark} -->\n```bash\npip install .*\n.*\n```", README), mark
