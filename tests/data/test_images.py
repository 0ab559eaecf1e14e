"""Every kind of image is read as it is or refused with a reason; what is written comes back."""

import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from jaxcomp.data.images import ImageError, Picture, read_image, read_rgb, write_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)


def save(path, array, **options):
    PIL.Image.fromarray(array).save(path, **options)
    return path


def png(path, depth, colour_type, rows):
    """A PNG written by hand, for what Pillow does not write."""
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, colour_type, 0, 0, 0)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_rgb(tmp_path):
    picture = read_image(save(tmp_path / "a.png", RGB))
    np.testing.assert_array_equal(picture.rgb, RGB)
    assert picture.alpha is None and not picture.grey


def test_grey_has_three_equal_channels(tmp_path):
    picture = read_image(save(tmp_path / "a.png", RGB[..., 0]))
    np.testing.assert_array_equal(picture.rgb, np.repeat(RGB[..., :1], 3, axis=-1))
    assert picture.grey and picture.alpha is None


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_grey_of_16_bits_keeps_them(tmp_path, suffix):
    picture = read_image(save(tmp_path / f"a.{suffix}", GREY16))
    assert picture.rgb.dtype == np.uint16 and picture.grey
    np.testing.assert_array_equal(picture.rgb[..., 2], GREY16)


def test_alpha(tmp_path):
    rgba = np.concatenate([RGB, RGB[..., :1]], axis=-1)
    picture = read_image(save(tmp_path / "a.png", rgba))
    np.testing.assert_array_equal(picture.rgb, RGB)
    np.testing.assert_array_equal(picture.alpha, RGB[..., 0])
    grey = read_image(save(tmp_path / "b.png", rgba[..., :2]))
    assert grey.grey
    np.testing.assert_array_equal(grey.alpha, RGB[..., 1])


def test_palette_with_transparency(tmp_path):
    image = PIL.Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=0)
    picture = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(picture.rgb, [[[10, 20, 30], [40, 50, 60]]])
    np.testing.assert_array_equal(picture.alpha, [[0, 255]])


def test_black_and_white(tmp_path):
    PIL.Image.fromarray(RGB[..., 0] > 99).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").rgb[..., 0], (RGB[..., 0] > 99) * np.uint8(255))


def test_exif_orientation_is_applied(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    np.testing.assert_array_equal(read_rgb(save(tmp_path / "a.png", RGB, exif=exif)), np.rot90(RGB, -1))


def test_one_pixel(tmp_path):
    np.testing.assert_array_equal(read_rgb(save(tmp_path / "a.png", RGB[:1, :1])), RGB[:1, :1])


@pytest.mark.parametrize("colour_type, channels", [(2, 3), (6, 4), (4, 2)])
def test_colour_of_16_bits_is_refused(tmp_path, colour_type, channels):
    rows = RNG.integers(0, 65536, (4, 5, channels)).astype(">u2")
    with pytest.raises(ImageError, match=r"16 bits of .*convert it to 8 bits per channel"):
        read_image(png(tmp_path / "a.png", 16, colour_type, rows))


def test_hand_written_png_of_8_bits_is_read(tmp_path):
    np.testing.assert_array_equal(read_rgb(png(tmp_path / "a.png", 8, 2, RGB)), RGB)


def test_floating_point_image_is_refused(tmp_path):
    with pytest.raises(ImageError, match="found mode F"):
        read_image(save(tmp_path / "a.tiff", RGB[..., 0].astype(np.float32)))


def test_large_images_are_refused_before_decoding(tmp_path):
    path = save(tmp_path / "a.png", RGB)
    with pytest.raises(ImageError, match=r"at most 34 pixels, found 7 x 5; crop it"):
        read_image(path, max_pixels=34)
    assert read_image(path, max_pixels=35).rgb.shape == (5, 7, 3)
    bomb = png(tmp_path / "b.png", 8, 2, np.zeros((1, 1, 3), np.uint8))
    data = bytearray(bomb.read_bytes())
    data[16:24] = struct.pack(">II", 2**30, 2**30)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    bomb.write_bytes(data)
    with pytest.raises(ImageError, match="at most 16777216 pixels"):
        read_image(bomb)


def test_damaged_files_are_refused(tmp_path):
    path = save(tmp_path / "a.png", RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = path.read_bytes()
    for i, damaged in enumerate([b"", b"not an image", whole[:8], whole[: len(whole) // 2], whole[:20] + whole[24:]]):
        (tmp_path / f"{i}.png").write_bytes(damaged)
        with pytest.raises(ImageError, match=rf"{i}.png: expected an undamaged image .*export it again"):
            read_image(tmp_path / f"{i}.png")


def test_flipped_bytes_give_a_picture_or_an_image_error(tmp_path):
    for suffix in ("png", "jpg", "webp", "bmp", "tiff", "ppm"):
        whole = save(tmp_path / f"a.{suffix}", np.tile(RGB, (3, 3, 1))).read_bytes()
        for position in RNG.integers(0, min(len(whole), 200), 40):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << RNG.integers(8)
            (tmp_path / f"b.{suffix}").write_bytes(damaged)
            try:
                assert read_image(tmp_path / f"b.{suffix}").rgb.ndim == 3
            except ImageError:
                pass


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ImageError, match="found nothing; check the path"):
        read_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match="found a folder"):
        read_image(tmp_path)


@pytest.mark.parametrize(
    "picture",
    [
        Picture(RGB),
        Picture(RGB, RGB[..., 1]),
        Picture(np.repeat(RGB[..., :1], 3, axis=-1), None, grey=True),
        Picture(np.repeat(RGB[..., :1], 3, axis=-1), RGB[..., 1], grey=True),
        Picture(np.repeat(GREY16[..., None], 3, axis=-1), None, grey=True),
    ],
)
def test_written_pictures_come_back(tmp_path, picture):
    write_image(tmp_path / "a.png", picture)
    found = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(found.rgb, picture.rgb)
    assert found.grey == picture.grey and (found.alpha is None) == (picture.alpha is None)
    if picture.alpha is not None:
        np.testing.assert_array_equal(found.alpha, picture.alpha)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_writing_refuses_what_it_cannot_keep(tmp_path):
    with pytest.raises(ImageError, match=r"a \.png file"):
        write_image(tmp_path / "a.jpg", Picture(RGB))
    with pytest.raises(ImageError, match="existing folder"):
        write_image(tmp_path / "absent" / "a.png", Picture(RGB))
    with pytest.raises(ImageError, match="16 bits of colour"):
        write_image(tmp_path / "a.png", Picture(RGB.astype(np.uint16)))
    with pytest.raises(ImageError, match="without alpha"):
        write_image(tmp_path / "b.png", Picture(RGB, RGB[..., 0]))
        read_rgb(tmp_path / "b.png")
