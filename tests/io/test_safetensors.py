"""The safetensors reader agrees with the reference library and refuses every malformed file."""

import json
import os
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxcomp.io.safetensors import (
    INDEX_NAME,
    CheckpointError,
    check_finite,
    open_safetensors,
    open_sharded,
    save_safetensors,
)

DTYPES = [np.bool_, np.uint8, np.int16, np.uint32, np.int64, np.float16, np.float32, np.float64, np.complex64]
DTYPES += [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def raw_file(path: pathlib.Path, header: object, data: bytes = b"", length: int | None = None) -> pathlib.Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_round_trips(tmp_path, dtype):
    tensors = {
        "matrix": np.arange(6).reshape(2, 3).astype(dtype),
        "scalar": np.ones((), dtype),
        "empty": np.zeros((0, 4), dtype),
        "transposed": np.arange(6).reshape(2, 3).astype(dtype).T,
    }
    save_safetensors(tmp_path / "a.safetensors", tensors, {"note": "é"})
    with open_safetensors(tmp_path / "a.safetensors") as file:
        assert sorted(file.keys()) == sorted(tensors)
        assert file.metadata == {"note": "é"}
        for name, tensor in tensors.items():
            assert file.info(name) == (tensor.dtype, tensor.shape)
            np.testing.assert_array_equal(file.read(name), tensor)


def test_reads_what_the_reference_library_writes(tmp_path):
    tensors = {f"t{i}": np.random.default_rng(i).normal(size=(i, 3)).astype(np.float32) for i in range(5)}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    with open_safetensors(tmp_path / "a.safetensors") as file:
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(file.read(name), tensor)


def test_views_are_lazy_read_only_and_outlive_the_file(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"x": np.arange(4.0)})
    with open_safetensors(tmp_path / "a.safetensors") as file:
        view = file.read("x")
    assert not view.flags.writeable and not view.flags.owndata
    np.testing.assert_array_equal(view, np.arange(4.0))
    with pytest.raises(ValueError, match="already closed"):
        file.read("x")


def test_missing_tensor_names_the_nearest(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"layers.0.weight": np.zeros(1)})
    with open_safetensors(tmp_path / "a.safetensors") as file:
        with pytest.raises(CheckpointError, match=r"layers\.0\.weight"):
            file.read("layers.1.weight")


MALFORMED = {
    "empty": (b"", b"", 0),
    "header beyond the file": ({"a": entry()}, b"", 10**6),
    "forged header length": ({"a": entry()}, b"\0" * 8, 2**63),
    "not JSON": (b"{nonsense}", b"", None),
    "not UTF-8": (b'{"\xff": 1}', b"", None),
    "lone surrogate": (b'{"\\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}', b"", None),
    "nested too deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", None),
    "huge integer": (b'{"a": ' + b"9" * 10_000 + b"}", b"", None),
    "NaN constant": (b'{"a": NaN, "b": 1}', b"", None),
    "list header": (b"[1, 2, 3, 4, 5]", b"", None),
    "leading space": (b"   {}    ", b"", None),
    "repeated key": (b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8, None),
    "entry is a list": ({"a": [1]}, b"", None),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, None),
    "extra field": ({"a": entry() | {"x": 1}}, b"\0" * 8, None),
    "unknown dtype": ({"a": entry("F33")}, b"\0" * 8, None),
    "sub-byte dtype": ({"a": entry("F4", (2,), (0, 1))}, b"\0", None),
    "dtype is a list": ({"a": entry(["F32"])}, b"\0" * 8, None),
    "negative size": ({"a": entry(shape=(-2,))}, b"\0" * 8, None),
    "float size": ({"a": entry(shape=(2.0,))}, b"\0" * 8, None),
    "boolean size": ({"a": entry("U8", (True,), (0, 1))}, b"\0", None),
    "size overflows": ({"a": entry(shape=(2**62, 4, 2**62))}, b"\0" * 8, None),
    "overflow hidden by zero": ({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, b"", None),
    "rank": ({"a": entry(shape=(1,) * 65, offsets=(0, 4))}, b"\0" * 4, None),
    "size against shape": ({"a": entry(shape=(3,))}, b"\0" * 8, None),
    "offsets reversed": ({"a": entry(offsets=(8, 0))}, b"\0" * 8, None),
    "negative offset": ({"a": entry(offsets=(-8, 0))}, b"\0" * 8, None),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, b"\0" * 8, None),
    "offsets out of file": ({"a": entry(offsets=(0, 8))}, b"\0" * 7, None),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, None),
    "hole": ({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20, None),
    "trailing bytes": ({"a": entry()}, b"\0" * 9, None),
    "metadata not strings": ({"__metadata__": {"a": 1}}, b"", None),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_a_clear_error(tmp_path, case):
    path = raw_file(tmp_path / "a.safetensors", *MALFORMED[case])
    with pytest.raises(CheckpointError, match=r"expected .*, found .*; ") as caught:
        open_safetensors(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1500


def test_not_a_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="expected a file"):
            open_safetensors(path)


def test_save_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"x": np.ones(2)})
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        save_safetensors(path, {"x": np.zeros(2)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_saved_file_is_readable_by_others(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"x": np.zeros(2, np.float32)})
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def test_save_refuses_dtypes_the_format_lacks(tmp_path):
    with pytest.raises(CheckpointError, match="int4"):
        save_safetensors(tmp_path / "a.safetensors", {"x": np.zeros(2, ml_dtypes.int4)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_check_finite_counts_and_locates(dtype):
    array = np.zeros((3, 4), dtype)
    assert check_finite("w", array) is array
    array[1, 2], array[2, 0] = np.nan, np.nan
    with pytest.raises(CheckpointError, match=r"'w': expected finite numbers, found 2 .* first at \(1, 2\)"):
        check_finite("w", array)


def test_read_can_refuse_non_finite(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"w": np.array([1.0, np.inf]), "ids": np.arange(3)})
    with open_safetensors(tmp_path / "a.safetensors") as file:
        np.testing.assert_array_equal(file.read("ids", finite=True), np.arange(3))
        with pytest.raises(CheckpointError, match="first at"):
            file.read("w", finite=True)


def write_shards(folder: pathlib.Path) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    save_safetensors(folder / "model-00001-of-00002.safetensors", {"a": np.arange(2.0)})
    save_safetensors(folder / "model-00002-of-00002.safetensors", {"b": np.arange(3.0), "c": np.arange(4.0)})
    weight_map = {name: f"model-0000{1 + (name != 'a')}-of-00002.safetensors" for name in "abc"}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: pathlib.Path, weight_map: dict) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("indexed", [True, False])
def test_sharded_folder(tmp_path, indexed):
    weight_map = write_shards(tmp_path)
    if not indexed:
        (tmp_path / INDEX_NAME).unlink()
    with open_sharded(tmp_path) as shards:
        assert shards.keys() == ["a", "b", "c"]
        assert {name: shards.file_of(name).name for name in "abc"} == weight_map
        np.testing.assert_array_equal(shards.read("c"), np.arange(4.0))


def test_single_file_folder(tmp_path):
    save_safetensors(tmp_path / "model.safetensors", {"a": np.arange(2.0)})
    with open_sharded(tmp_path) as shards:
        np.testing.assert_array_equal(shards.read("a"), np.arange(2.0))


def test_index_and_shards_must_agree(tmp_path):
    weight_map = write_shards(tmp_path)
    first, second = sorted(set(weight_map.values()))
    for wrong in (weight_map | {"d": first}, {"a": first, "b": second}, weight_map | {"b": first}):
        write_index(tmp_path, wrong)
        with pytest.raises(CheckpointError, match="index and shards differ"):
            open_sharded(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    write_shards(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    save_safetensors(tmp_path / "model-00003-of-00003.safetensors", {"a": np.zeros(2)})
    with pytest.raises(CheckpointError, match="each tensor in one shard"):
        open_sharded(tmp_path)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {}}])
def test_malformed_index(tmp_path, index):
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        open_sharded(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x", "..", "", "a\\b", "a\0b", "x" * 5000])
def test_shard_outside_the_folder(tmp_path, name):
    save_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(1)})
    (tmp_path / "model").mkdir()
    write_index(tmp_path / "model", {"a": name})
    with pytest.raises(CheckpointError):
        open_sharded(tmp_path / "model")


def test_links_may_not_leave_the_folder_except_into_hub_blobs(tmp_path):
    blob = tmp_path / "models--a--b" / "blobs" / "0123"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_safetensors(blob, {"a": np.arange(2.0)})
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    np.testing.assert_array_equal(open_sharded(snapshot).read("a"), np.arange(2.0))
    stray = tmp_path / "stray"
    stray.mkdir()
    (stray / "model.safetensors").symlink_to(blob)
    with pytest.raises(CheckpointError, match="a link to"):
        open_sharded(stray)
