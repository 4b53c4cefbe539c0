"""The one error a person must mend."""

from __future__ import annotations


class UserError(Exception):
    """Something the user must mend: one line that says what is wrong, and how to mend it. Never a traceback."""

    def __init__(self, problem: str, mend: str = "") -> None:
        super().__init__(f"{problem} {mend}".strip())
        self.problem, self.mend = problem, mend
