"""The corpus of the running interpreter."""

import sys

from jaxcomp.data import stdlib, text

SOURCE = b'''"""Module text."""
raise SystemExit("parsed, never run")

# One line alone is no prose.
x = 1  # nor is this

# A block comment
#   of two lines.
class A:
    """Class text.

    Second paragraph."""

    async def f(self):
        "Function text."
        # Inner block,
        # two lines.

def g(): 0
'''


def test_docstrings_come_in_source_order_without_indentation():
    expected = ["Module text.", "Class text.\n\nSecond paragraph.", "Function text."]
    assert stdlib.docstrings(SOURCE) == expected


def test_comments_are_blocks_without_signs():
    assert stdlib.comments(SOURCE) == ["A block comment\n  of two lines.", "Inner block,\ntwo lines."]


def test_broken_source_has_no_docstrings():
    assert stdlib.docstrings(b"def f(:\n") == []
    assert stdlib.docstrings(b'"""Text."""\0') == []


def test_split_follows_the_name_alone():
    names = ["topic types", "module typing.py", "module json/decoder.py"]
    assert [stdlib.split_of(name) for name in names] == ["validation", "calibration", "train"]
    shares = [stdlib.split_of(f"module {i}.py") for i in range(4000)]
    assert 0.08 < shares.count("validation") / 4000 < 0.12
    assert 0.035 < shares.count("calibration") / 4000 < 0.065


def test_documents_are_distinct_and_free_of_copyright_notes():
    documents = stdlib.documents()
    paragraphs = [p for document in documents.values() for p in document]
    assert len(paragraphs) == len(set(paragraphs)) > 8000
    assert not any("copyright" in p.lower() for p in paragraphs)
    assert "module json/decoder.py" in documents and "topic assert" in documents
    assert not any("site-packages" in name or name.startswith("module test/") for name in documents)


def test_reading_the_corpus_imports_no_module_of_it():
    stdlib.documents.cache_clear()
    before = set(sys.modules)
    stdlib.documents()
    assert set(sys.modules) - before <= {"pydoc_data", "pydoc_data.topics"}


def test_write_held_out_writes_the_held_out_excerpts(tmp_path):
    stdlib.write_held_out(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.txt", "validation.txt"]
    for split in stdlib.HELD_OUT:
        assert text.read_text(tmp_path / f"{split}.txt") == stdlib.split_text(split)
