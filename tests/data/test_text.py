"""Embedded text, files, windows and batches."""

import hashlib

import numpy as np
import pytest

from jaxcomp.data import stdlib, text


def test_held_out_text_is_the_same_on_every_python():
    digests = {split: hashlib.sha256(text.embedded_text(split).encode()).hexdigest()[:16] for split in stdlib.HELD_OUT}
    assert digests == {"validation": "587060dfd17936f0", "calibration": "b2194acbb1dc30e4"}


def test_training_text_is_large_and_holds_nothing_held_out():
    train = text.embedded_text("train")
    held_out = "".join(map(text.embedded_text, stdlib.HELD_OUT))
    assert len(train) > 1_500_000
    assert not [p for p in train.split("\n\n") if len(p) > 200 and p in held_out]


def test_unknown_split_names_the_known_ones():
    with pytest.raises(ValueError, match="'test' is unknown; expected one of train, validation, calibration"):
        text.embedded_text("test")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "expected text, found 0 bytes"),
        (b" \n\t ", "expected text, found 4 bytes without a printable character"),
        (b"caf\xe9 au lait", r"expected UTF-8, found byte 0xe9 at offset 3; convert"),
    ],
)
def test_unreadable_content_is_explained(tmp_path, content, message):
    file = tmp_path / "corpus.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"corpus\.txt: {message}"):
        text.read_text(file)


def test_missing_file_and_folder_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.txt: expected a text file, found nothing"):
        text.read_text(tmp_path / "absent.txt")
    with pytest.raises(FileNotFoundError, match="found a folder"):
        text.read_text(tmp_path)


def test_read_text_returns_what_was_written(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve\nλ".encode())
    assert text.read_text(str(tmp_path / "a.txt")) == "naïve\nλ"


def test_wikitext2_joins_rows_like_the_literature(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "wikitext2_test.txt").write_text(" \n = Title = \n \n One line . \n")
    assert text.wikitext2(tmp_path, "test") == "\n\n = Title = \n\n\n\n\n One line . \n"
    with pytest.raises(FileNotFoundError, match=r"wikitext2_valid\.txt: expected a text file"):
        text.wikitext2(tmp_path, "valid")
    with pytest.raises(ValueError, match="'train' is unknown"):
        text.wikitext2(tmp_path, "train")


def test_wikitext2_of_the_real_files(data_dir):
    valid, test = (text.wikitext2(data_dir, split) for split in ("valid", "test"))
    assert test.startswith("\n\n = Robert <unk> = \n\n\n\n\n")
    assert len(test.split()) == 241_211 and len(valid.split()) == 213_886


def test_windows_are_consecutive_and_drop_the_rest():
    windows = text.token_windows(list(range(11)), 3)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows, [[0, 1, 2], [3, 4, 5], [6, 7, 8]])


def test_short_text_and_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="the text has 3 tokens, fewer than one window of 4"):
        text.token_windows([1, 2, 3], 4)
    with pytest.raises(ValueError, match=r"found shape \(2, 2\)"):
        text.token_windows(np.zeros((2, 2)), 2)
    with pytest.raises(ValueError, match="length 1"):
        text.token_windows([1, 2, 3], 1)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_an_epoch_visits_every_window_at_most_once():
    epoch = np.concatenate(take(text.batches(np.arange(100), 4, 3, seed=0), 8))
    assert epoch.shape == (24, 4) and epoch.dtype == np.int32
    np.testing.assert_array_equal(np.diff(epoch, axis=1), 1)
    assert len(set(epoch[:, 0])) == 24


def test_epochs_differ_in_order_and_offset():
    first, second = np.split(np.stack(take(text.batches(np.arange(100), 4, 3, seed=0), 16)), 2)
    assert set(first[..., 0].flat) != set(second[..., 0].flat)


@pytest.mark.parametrize("start", [1, 7, 8, 9, 20])
def test_batches_resume_at_any_number(start):
    whole = take(text.batches(np.arange(100), 4, 3, seed=5), start + 10)
    resumed = take(text.batches(np.arange(100), 4, 3, seed=5, start=start), 10)
    np.testing.assert_array_equal(resumed, whole[start:])


def test_seed_decides_the_batches():
    first, again, other = (take(text.batches(np.arange(100), 4, 3, seed=s), 3) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_too_few_tokens_for_a_batch():
    with pytest.raises(ValueError, match="15 tokens give no batch of 3 x 4; 16 are needed"):
        next(text.batches(np.arange(15), 4, 3, seed=0))
    assert next(text.batches(np.arange(16), 4, 3, seed=0)).shape == (3, 4)
