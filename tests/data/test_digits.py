"""The embedded digits, MNIST files as untrusted input, latents and contact sheets."""

import gzip

import numpy as np
import pytest

from jaxcomp.data import digits


def test_splits_are_disjoint_and_whole():
    train, test, whole = (digits.digits(split) for split in ("train", "test", "all"))
    assert train.images.shape == (1500, 8, 8, 1) and test.images.shape == (297, 8, 8, 1)
    np.testing.assert_array_equal(np.concatenate([train.images, test.images]), whole.images)
    assert whole.images.min() == -1 and whole.images.max() == 1
    assert set(whole.labels) == set(range(10)) and whole.labels.dtype == np.int32
    with pytest.raises(ValueError, match="split 'valid'"):
        digits.digits("valid")


def test_the_images_show_their_labels():
    """Every test digit's nearest training digit has its class, nearly always."""
    train, test = digits.digits("train"), digits.digits("test")
    flat = lambda part: part.images.reshape(len(part.labels), -1)
    distance = np.square(flat(train)).sum(1)[None] - 2 * flat(test) @ flat(train).T
    assert np.mean(train.labels[distance.argmin(1)] == test.labels) > 0.9


def test_latents_hold_squares_of_pixels():
    images = digits.digits("test").images[:3]
    latents = digits.to_latents(images)
    np.testing.assert_array_equal(latents[0, 1, 2], images[0, 2:4, 4:6, 0].reshape(-1))
    np.testing.assert_array_equal(digits.to_images(latents), images)


def test_mnist_is_read(data_dir):
    found = digits.mnist(data_dir)
    assert found.images.shape == (10_000, 28, 28, 1) and set(found.labels) == set(range(10))
    assert found.images.min() == -1 and found.images.max() == 1


def write(path, raw):
    with gzip.open(path, "wb") as file:
        file.write(raw)


HEADER = b"\0\0\x08\x01\0\0\0\x02"  # two bytes follow


@pytest.mark.parametrize(
    "raw",
    [b"", HEADER + b"a", HEADER + b"abc", HEADER.replace(b"\x08", b"\x0d") + b"ab", HEADER[:4] + b"\xff" * 4 + b"ab"],
)
def test_damaged_idx_files_are_refused(tmp_path, raw):
    write(tmp_path / "a.gz", raw)
    with pytest.raises(ValueError, match=r"a\.gz.*fetch it again"):
        digits.read_idx(tmp_path / "a.gz", 1)


def test_files_that_are_no_idx_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a gzipped idx file"):
        digits.read_idx(tmp_path / "none.gz", 1)
    (tmp_path / "text.gz").write_text("hello")
    with pytest.raises(ValueError, match="gzipped"):
        digits.read_idx(tmp_path / "text.gz", 1)
    write(tmp_path / "good.gz", HEADER + b"ab")
    np.testing.assert_array_equal(digits.read_idx(tmp_path / "good.gz", 1), [97, 98])
    (tmp_path / "cut.gz").write_bytes((tmp_path / "good.gz").read_bytes()[:-10])
    with pytest.raises(ValueError, match="fetch it again"):
        digits.read_idx(tmp_path / "cut.gz", 1)


def test_contact_sheet_lays_images_out_in_rows():
    images = np.full((4, 2, 2, 1), -1.0)
    images[3] = 1.0
    sheet = digits.contact_sheet(images, columns=2, zoom=3)
    assert sheet.shape == (14, 14, 3) and sheet.dtype == np.uint8
    assert sheet[0, 0, 0] == 255 and sheet[-2, -2, 0] == 0 and sheet[6, 0, 0] == 128
    with pytest.raises(ValueError, match="multiple of 3"):
        digits.contact_sheet(images, columns=3)
