"""Text and token windows: the embedded corpus, files, WikiText-2, fixed windows and shuffled batches."""

import functools
import pathlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32

from jaxcomp.data import stdlib

ASSETS = pathlib.Path(__file__).parent / "assets"
SPLITS = ("train", *stdlib.HELD_OUT)


@functools.cache
def embedded_text(split: str) -> str:
    """English that needs no download: 'train', 'calibration' or 'validation'.

    The last two are files of this package, equal on every Python, and carry the reported numbers. 'train' is the
    running interpreter's own documentation (it differs a little among versions) without any held-out paragraph.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
    if split in stdlib.HELD_OUT:
        return read_text(ASSETS / "text" / f"{split}.txt")
    held_out = "".join(map(embedded_text, stdlib.HELD_OUT))
    documents = stdlib.documents()
    names = [name for name in documents if stdlib.split_of(name) == "train"]
    return stdlib.join([p for name in names for p in documents[name] if p not in held_out])


def read_text(path: str | pathlib.Path) -> str:
    """Text of a UTF-8 file; raises FileNotFoundError, or ValueError for an empty, blank or undecodable one."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a text file, found {'a folder' if path.is_dir() else 'nothing'}")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise ValueError(f"{path}: expected UTF-8, found {found}; convert the file to UTF-8") from error
    if not text.strip():
        raise ValueError(f"{path}: expected text, found {len(raw)} bytes without a printable character")
    return text


def wikitext2(data_dir: str | pathlib.Path, split: str) -> str:
    """WikiText-2 'valid' or 'test' from `data_dir/text/wikitext2_<split>.txt`, joined as in the GPTQ literature.

    Papers join the rows of the `datasets` release by two newlines; a row is a line with its newline, or empty for a
    blank line. The files are the word-level release (`<unk>`, ` @-@ `), so perplexities differ from the raw one's.
    """
    if split not in ("valid", "test"):
        raise ValueError(f"WikiText-2 split {split!r} is unknown; expected 'valid' or 'test'")
    lines = read_text(pathlib.Path(data_dir, "text", f"wikitext2_{split}.txt")).removesuffix("\n").split("\n")
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)


def token_windows(tokens, length: int) -> Int32[np.ndarray, "n length"]:
    """Consecutive windows that do not overlap; the rest that fills no window is dropped."""
    tokens = np.asarray(tokens, dtype=np.int32)
    if tokens.ndim != 1 or length < 2:
        raise ValueError(f"expected a flat token list and length >= 2, found shape {tokens.shape} and length {length}")
    count = len(tokens) // length
    if count == 0:
        raise ValueError(f"the text has {len(tokens)} tokens, fewer than one window of {length}; shorten the window")
    return tokens[: count * length].reshape(count, length)


def batches(
    tokens, length: int, batch_size: int, seed: int, start: int = 0
) -> Iterator[Int32[np.ndarray, "batch length"]]:
    """Endless training batches from batch number `start` on: a fresh offset and order of windows every epoch.

    The batch is a function of (seed, its number) alone, so a resumed run sees what the interrupted one would have.
    """
    tokens = np.asarray(tokens, dtype=np.int32)
    per_epoch = (len(token_windows(tokens, length)) - 1) // batch_size
    if per_epoch < 1:
        need = (batch_size + 1) * length
        raise ValueError(f"{len(tokens)} tokens give no batch of {batch_size} x {length}; {need} are needed")
    epoch, skip = divmod(start, per_epoch)
    while True:
        rng = np.random.default_rng((seed, epoch))
        windows = token_windows(tokens[rng.integers(length) :], length)
        order = rng.permutation(len(windows))
        for i in range(skip, per_epoch):
            yield windows[order[i * batch_size : (i + 1) * batch_size]]
        epoch, skip = epoch + 1, 0
