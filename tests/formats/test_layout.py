"""Layouts against numpy: matrices, transposes and reshapes."""

import itertools

import numpy as np
import pytest

from jaxcomp.formats.layout import Layout

CASES = [
    ((6, 4), (0,)),
    ((6, 4), (1,)),
    ((5, 2, 3), (0,)),
    ((2, 3, 5), (0, 1)),
    ((3, 3, 4, 8), (0, 1, 2)),
    ((4, 6, 5), (1,)),
]


def array(shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("shape,contract", CASES)
def test_matrix_round_trip_and_product(shape, contract):
    x = array(shape)
    layout = Layout.of(shape, contract)
    matrix = layout.to_matrix(x)
    np.testing.assert_array_equal(layout.to_array(matrix), x)
    ones = np.ones([shape[a] for a in contract], np.float32)
    want = np.tensordot(ones, x, (range(len(contract)), contract))
    np.testing.assert_array_equal(matrix.sum(-1).reshape(want.shape), want)


@pytest.mark.parametrize("shape,contract", CASES)
def test_transpose(shape, contract):
    x = array(shape)
    layout = Layout.of(shape, contract)
    for perm in itertools.permutations(range(len(shape))):
        np.testing.assert_array_equal(layout.transpose(perm).to_array(layout.to_matrix(x)), x.transpose(perm))


@pytest.mark.parametrize(
    "shape,contract,new",
    [
        ((6, 4), (0,), (1, 6, 4)),
        ((6, 4), (0,), (6, 1, 4, 1)),
        ((6, 4), (0,), (2, 3, 4)),
        ((6, 4), (0,), (6, 2, 2)),
        ((5, 2, 3), (0,), (5, 6)),
        ((2, 3, 5), (0, 1), (6, 5)),
        ((2, 3, 5), (0, 1), (1, 6, 5, 1)),
        ((1, 6, 4), (1,), (6, 4)),
        ((3, 3, 4, 8), (0, 1, 2), (36, 8)),
        ((3, 3, 4, 8), (0, 1, 2), (9, 4, 2, 4)),
    ],
)
def test_reshape(shape, contract, new):
    x = array(shape)
    layout = Layout.of(shape, contract)
    reshaped = layout.reshape(new)
    np.testing.assert_array_equal(reshaped.to_array(layout.to_matrix(x)), x.reshape(new))
    assert reshaped.matrix_shape == layout.matrix_shape


@pytest.mark.parametrize(
    "shape,contract,new", [((6, 4), (0,), (24,)), ((5, 2, 3), (0,), (10, 3)), ((6, 4), (0,), (4, 6))]
)
def test_reshape_that_mixes_rows_and_columns_is_refused(shape, contract, new):
    assert Layout.of(shape, contract).reshape(new) is None


def test_transposed_axes_do_not_merge():
    assert Layout.of((5, 2, 3), (0,)).transpose((0, 2, 1)).reshape((5, 6)) is None


def test_contraction_must_cover_the_columns():
    layout = Layout.of((2, 3, 5), (0, 1))
    assert layout.contraction_order((0, 1)) == [0, 1]
    assert layout.contraction_order((1, 0)) == [1, 0]
    assert layout.contraction_order((0,)) is None
    assert layout.contraction_order((2,)) is None
