"""English that every Python carries: the help topics of `pydoc`, the docstrings and comments of the standard library.

Sources are parsed, never imported. A document is one help topic, or the docstrings and block comments of one
module; its split follows from a hash of its *name*, so that an edited text stays on its side in every Python version.
"""

import ast
import functools
import hashlib
import pathlib
import re
import sysconfig
import warnings
from collections.abc import Iterator

HELD_OUT = ("validation", "calibration")
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "distutils", "__pycache__"}
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#+ .*\n){2,}", re.MULTILINE)
_COMMENT_SIGN = re.compile(r"^[ \t]*#+ ", re.MULTILINE)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def split_of(name: str) -> str:
    """Split of a document: 1/10 validation, 1/20 calibration, the rest train, by the SHA-256 of its name."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 20
    return {0: "validation", 1: "validation", 2: "calibration"}.get(bucket, "train")


@functools.cache
def documents() -> dict[str, list[str]]:
    """{name: paragraphs} of this interpreter in a fixed order.

    A paragraph that occurs twice is kept once (many help topics are passages of another one); notes of copyright
    are left out.
    """
    seen, result = set(), {}
    for name, texts in [*_topics(), *_modules()]:
        paragraphs = dict.fromkeys(p for text in texts for p in text.split("\n\n") if p.strip())
        fresh = [p for p in paragraphs if p not in seen and "copyright" not in p.lower()]
        seen.update(fresh)
        if fresh:
            result[name] = fresh
    return result


def _topics() -> Iterator[tuple[str, list[str]]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", [topics[name].strip()]


def _modules() -> Iterator[tuple[str, list[str]]]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _NOT_LIBRARY.intersection(name.parts):
            source = path.read_bytes()
            yield f"module {name.as_posix()}", docstrings(source) + comments(source)


def docstrings(source: bytes) -> list[str]:
    """Docstrings of a Python source in the order of its lines; none if it does not parse."""
    try:
        with warnings.catch_warnings(action="ignore"):
            nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, _DOCUMENTED)]
    except (SyntaxError, ValueError):
        return []
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def comments(source: bytes) -> list[str]:
    """Comments of at least two lines of a Python source, without their signs."""
    blocks = _COMMENT_BLOCK.findall(source.decode("utf-8", errors="replace"))
    return [_COMMENT_SIGN.sub("", block).strip() for block in blocks]


def join(paragraphs: list[str]) -> str:
    """One text of the paragraphs, an empty line between any two."""
    return "\n\n".join(paragraphs) + "\n"


def split_text(split: str) -> str:
    """Text of a split ('train', 'validation', 'calibration') as this interpreter has it."""
    return join([p for name, paragraphs in documents().items() if split_of(name) == split for p in paragraphs])


def write_held_out(folder: str) -> None:
    """Writes `validation.txt` and `calibration.txt` of this interpreter, the files that ship as `assets/text`."""
    for split in HELD_OUT:
        pathlib.Path(folder, f"{split}.txt").write_text(split_text(split), encoding="utf-8", newline="\n")
