"""Which leaves a method touches, and with which options: path rules, first match wins."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Rule:
    """Options for the leaves whose path matches a pattern.

    `*` matches within one path segment, `**` any number of segments; a pattern also matches everything below the node that it
    names, so `blocks_*/mlp/down` covers `blocks_3/mlp/down/kernel`. A pattern that starts with `re:` is a regular expression
    that must match the whole path. `Rule(pattern, skip=True)` leaves the matched leaves alone.
    """

    def __init__(self, pattern: str, *, skip: bool = False, **options: Any):
        self.pattern, self.skip, self.options = pattern, skip, options
        self._regex = re.compile(_regex(pattern))

    def matches(self, path: str) -> bool:
        """True if the rule covers `path`."""
        return self._regex.fullmatch(path) is not None

    def __repr__(self) -> str:
        extra = ["skip=True"] if self.skip else [f"{k}={v!r}" for k, v in self.options.items()]
        return f"Rule({', '.join([repr(self.pattern), *extra])})"


def resolve(rules: Sequence[Rule], paths: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """`{path: options of the first matching rule}`; paths without a rule, or with a skipping one, are absent.

    Raises:
      ValueError: a rule matches no path (the message names the nearest ones), or only paths that earlier rules took.
    """
    paths = list(paths)
    owner = {path: next((i for i, rule in enumerate(rules) if rule.matches(path)), None) for path in paths}
    for i, rule in enumerate(rules):
        if i in owner.values():
            continue
        matched = [p for p in paths if rule.matches(p)]
        if not matched:
            near = difflib.get_close_matches(rule.pattern, paths, n=3, cutoff=0.0)
            raise ValueError(f"{rule} matches no leaf; the nearest paths are {near}")
        raise ValueError(
            f"{rule} never applies: {rules[owner[matched[0]]]} comes first and takes {matched[0]!r}; swap them"
        )
    return {p: rules[i].options for p, i in owner.items() if i is not None and not rules[i].skip}


def _regex(pattern: str) -> str:
    if pattern.startswith("re:"):
        return pattern[3:]
    parts = re.split(r"(\*\*/?|\*|\?)", pattern.rstrip("/"))
    glob = {"**": ".*", "**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(glob.get(p, re.escape(p)) for p in parts) + "(?:/.*)?"
