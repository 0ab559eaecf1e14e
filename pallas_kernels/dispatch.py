"""How a kernel's public function picks among its implementations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Choice(NamedTuple):
    """Which implementation runs, and why the ones before it do not.

    Attributes:
      name: the implementation.
      reasons: implementation -> why it was passed over.
    """

    name: str
    reasons: dict[str, str]


def first_that_covers(names: Sequence[str], refuse: Callable[[str], str | None], what: str) -> Choice:
    """The first name that `refuse` has no reason against.

    Raises:
      ExceptionGroup: it has one against each; one NotImplementedError each.
    """
    reasons = {}
    for name in names:
        if (reason := refuse(name)) is None:
            return Choice(name, reasons)
        reasons[name] = reason
    errors = [NotImplementedError(f"{name}: {reason}") for name, reason in reasons.items()]
    raise ExceptionGroup(f"none of {', '.join(names)} covers this {what}; 'xla' always does", errors)


def backend(known: Mapping[str, Any], name: str) -> Any:
    """The back end of a name. Raises ValueError for an unknown one."""
    if name not in known:
        raise ValueError(f"unknown implementation {name!r}; known: {', '.join(known)}")
    return known[name]


def as_names(implementation: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """An `implementation=` argument as a hashable tuple of names; None stays None, the platform's own order."""
    if implementation is None:
        return None
    return (implementation,) if isinstance(implementation, str) else tuple(implementation)
