"""Bits for a budget: the knapsack against enumeration, its certificate, and what the bytes and rules promise."""

import itertools

import jax
import numpy as np
import pytest

from jaxcomp.core.leaf import is_compressed, leaves_with_paths, materialise_tree, nbytes
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import compress
from jaxcomp.quantize import gptq, rtn
from jaxcomp.quantize.allocate import Sensitivity, allocate, measure, shared_call
from jaxcomp.quantize.learned import BLOCKS

CHOICES = ({"bits": 2}, {"bits": 3}, {"bits": 8})


def random_problem(seed, groups=5, choices=3, unit=4):
    rng = np.random.default_rng(seed)
    size = unit * np.sort(rng.integers(1, 60, (groups, choices)))
    cost = np.sort(rng.exponential(size=(groups, choices)))[:, ::-1]
    return Sensitivity({f"g{i}": (f"g{i}/kernel",) for i in range(groups)}, CHOICES[:choices], cost, size, rest=100)


def best_by_enumeration(problem, budget):
    rows = np.arange(len(problem.cost))
    sums = [
        (problem.cost[rows, c].sum(), problem.rest + problem.bytes[rows, c].sum())
        for c in map(list, itertools.product(range(problem.cost.shape[1]), repeat=len(rows)))
    ]
    return min(cost for cost, size in sums if size <= budget)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_optimum_and_the_bound_is_one(seed):
    problem = random_problem(seed)
    largest = problem.rest + int(problem.bytes.max(1).sum())
    for budget in np.linspace(problem.smallest, largest, 7).astype(int).tolist():
        found = allocate(problem, budget)
        assert found.bytes <= budget
        assert found.cost == pytest.approx(best_by_enumeration(problem, budget), rel=1e-12)
        assert found.bound <= found.cost * (1 + 1e-12)
    assert found.bound == pytest.approx(found.cost) and found.bytes == largest  # everything fits: nothing is given up


def test_coarse_units_stay_within_the_budget_and_near_the_bound(monkeypatch):
    problem = random_problem(0, groups=40, unit=4099)
    budget = (problem.smallest + problem.rest + int(problem.bytes.max(1).sum())) // 2
    exact = allocate(problem, budget)
    monkeypatch.setattr("jaxcomp.quantize.allocate._UNITS", 500)
    coarse = allocate(problem, budget)
    assert coarse.bytes <= budget and exact.cost <= coarse.cost <= 1.05 * exact.bound


def test_too_small_a_budget_names_what_can_be_reached():
    problem = random_problem(0)
    assert allocate(problem, problem.smallest).bytes == problem.smallest
    want = f"budget of {problem.smallest - 1:,} bytes: the smallest tree has {problem.smallest:,} bytes"
    with pytest.raises(ValueError, match=want):
        allocate(problem, problem.smallest - 1)


def test_kernels_of_one_call_share_their_bits():
    assert shared_call("blocks_3/attn/k/kernel") == shared_call("blocks_3/attn/q/kernel") != "blocks_3/attn/k/kernel"
    assert shared_call("blocks_3/mlp/up/kernel") == shared_call("blocks_3/mlp/gate/kernel")
    assert shared_call("blocks_3/mlp/down/kernel") == "blocks_3/mlp/down/kernel"


@pytest.fixture(scope="module")
def measured(toy):
    return measure(toy.params, toy.data, BLOCKS, CHOICES, symmetric=False)


def test_sensitivity_is_the_divergence_of_one_group_alone(toy, measured):
    assert list(measured.groups) == list(
        dict.fromkeys(shared_call(p) for paths in measured.groups.values() for p in paths)
    )
    assert len(measured.groups) == 8 and (np.diff(measured.cost) < 0).all()
    at = list(measured.groups).index("blocks_1/mlp/down/kernel")
    one = compress(rtn(2, rules=[Rule("blocks_1/mlp/down")], symmetric=False), toy.params, toy.data)[0]
    one = materialise_tree(one)
    log_p, log_q = (
        jax.nn.log_softmax(np.stack([toy.apply(p, x) for x in toy.data.batches])) for p in (toy.params, one)
    )
    want = float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), -1)))
    assert measured.cost[at, 0] == pytest.approx(want, rel=1e-3)


def test_any_quantizer_takes_the_rules_and_the_bytes_are_the_promised(toy, measured):
    dense = {p: leaf for p, leaf in leaves_with_paths(toy.params).items() if p == "head/kernel"}
    assert measured.rest >= sum(leaf.nbytes for leaf in dense.values())
    uniform = compress(rtn(3, rules=BLOCKS, symmetric=False), toy.params, toy.data)[0]
    found = allocate(measured, nbytes(uniform))
    for method in (rtn, gptq):
        params = compress(method(rules=found.rules, symmetric=False), toy.params, toy.data)[0]
        assert nbytes(params) == found.bytes <= nbytes(uniform)
        bits = {p: leaf.grid.bits for p, leaf in leaves_with_paths(params).items() if is_compressed(leaf)}
        assert bits == {path: options["bits"] for path, options in found.options.items()}
    assert len(set(bits.values())) > 1
    column = CHOICES.index({"bits": 3})
    assert found.cost < measured.cost[:, column].sum()
