"""What every bench gives back, and how it starts a process that is ratchet itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from agent import resources


@dataclass(frozen=True, slots=True)
class Finding:
    """What a bench found: ``facts`` as one JSON object, and the same as a table for a person."""

    title: str
    facts: dict[str, Any]
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = field(default_factory=list)
    ok: bool = True
    """False: what was measured is not as it must be, and the command ends with exit code 1."""


def show(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def own_environment(**variables: str) -> dict[str, str]:
    """The environment of a process that runs this very version of the package, with ``variables`` on top."""
    paths = [str(resources.PACKAGE.parent), *(entry for entry in sys.path if entry)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), **variables}
