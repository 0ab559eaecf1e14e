"""Path rules: matching, order, and errors that name the way out."""

import pytest

from jaxcomp.core.rules import Rule, resolve

PATHS = [
    "embed/embedding",
    "blocks_0/attn/q/kernel",
    "blocks_0/mlp/down/kernel",
    "blocks_10/mlp/down/kernel",
    "head/kernel",
]


@pytest.mark.parametrize(
    "pattern,matched",
    [
        ("blocks_*/mlp/down", [2, 3]),
        ("blocks_?/mlp/down/kernel", [2]),
        ("blocks_*", [1, 2, 3]),
        ("**/kernel", [1, 2, 3, 4]),
        ("**", [0, 1, 2, 3, 4]),
        ("*/kernel", [4]),
        ("re:.*down.*", [2, 3]),
        ("re:down", []),
        ("blocks_1", []),
    ],
)
def test_matching(pattern, matched):
    assert [i for i, p in enumerate(PATHS) if Rule(pattern).matches(p)] == matched


def test_first_match_wins_and_skip_leaves_alone():
    rules = [Rule("blocks_10", bits=8), Rule("head", skip=True), Rule("**/kernel", bits=3)]
    assert resolve(rules, PATHS) == {PATHS[1]: {"bits": 3}, PATHS[2]: {"bits": 3}, PATHS[3]: {"bits": 8}}


def test_rule_without_match_names_the_nearest_paths():
    with pytest.raises(ValueError, match=r"blocks_\*/mlp/donw.*matches no leaf.*blocks_0/mlp/down/kernel"):
        resolve([Rule("blocks_*/mlp/donw")], PATHS)


def test_shadowed_rule_names_the_rule_before_it():
    with pytest.raises(ValueError, match=r"never applies: Rule\('\*\*/kernel', bits=4\) comes first"):
        resolve([Rule("**/kernel", bits=4), Rule("head", bits=8)], PATHS)
