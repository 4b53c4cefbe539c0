"""What a proposer's threads have to say to the campaign, which alone writes the ledger; and the campaign's word that it
is over, so that no thread asks on behalf of a night that has ended.
"""

from __future__ import annotations

import queue
import threading


class News:
    """Lines, in the order in which they were told. Any thread may tell; the campaign's takes."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.over = threading.Event()

    def tell(self, text: str) -> None:
        """Say ``text``, one line for a person."""
        self._lines.put(text)

    def take(self) -> list[str]:
        """What was told since."""
        found = []
        while not self._lines.empty():
            found.append(self._lines.get())
        return found
