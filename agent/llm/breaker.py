"""A circuit breaker: whether a model is asked now. Closed, it is; open, it rests until a probe that is due has worked.

What may pass (an overload, a stall, a lost connection) opens it after ``PATIENCE`` failed questions in a row, for
``REST`` seconds, doubled with each probe in vain up to ``LONGEST_REST``: an endpoint that was down for hours is back in
use two minutes after it is back. What no waiting mends (a refused key, an empty account, an unknown model) opens it at
once, for longer: a key can be renewed and an account topped up in the night. A server that says how long to wait is
believed, up to an hour. Rests are spread by a fifth, so that many clients do not come back together.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from agent.llm.answers import Auth, BadRequest, ContextOverflow, EndpointError, Quota, RateLimited

PATIENCE = 2
REST, LONGEST_REST = 15.0, 120.0
LONG_REST, LONGEST_LONG_REST = 300.0, 1800.0
LONGEST_ASKED = 3600.0
"""Seconds of a server's Retry-After that are kept to."""


class Breaker:
    """Of one model. Threads may share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic,
                 jitter: Callable[[], float] = random.random) -> None:
        self._clock, self._jitter = clock, jitter
        self._lock = threading.Lock()
        self._failures = self._openings = 0
        self._until: float | None = None
        self._probing = False
        self.lasting = False
        """Opened by what no waiting mends."""

    @property
    def closed(self) -> bool:
        return self._until is None

    def failed(self, error: EndpointError) -> bool:
        """A question, or a probe, got no reply. True when this opened the breaker."""
        with self._lock:
            self._failures += 1
            was_closed, probed = self._until is None, self._probing
            self._probing = False
            lasting = isinstance(error, (Auth, Quota, ContextOverflow)) or (
                isinstance(error, BadRequest) and error.status == 404)
            asked = error.retry_after if isinstance(error, RateLimited) else None
            if not was_closed and not probed:
                return False  # asked before it opened
            if was_closed and not lasting and asked is None and self._failures < PATIENCE:
                return False
            first, most = (LONG_REST, LONGEST_LONG_REST) if lasting else (REST, LONGEST_REST)
            rest = min(most, first * 2.0 ** min(self._openings, 20)) if asked is None else min(LONGEST_ASKED, asked)
            self._openings += 1
            self._until = self._clock() + rest * (1 + 0.2 * self._jitter())
            self.lasting = lasting
            return was_closed

    def trip(self, error: EndpointError) -> bool:
        """Open it at once. True where it was closed."""
        with self._lock:
            self._failures = PATIENCE
        return self.failed(error)

    def worked(self) -> None:
        """A question got its reply: all is forgotten."""
        with self._lock:
            self._failures = self._openings = 0
            self._until, self._probing, self.lasting = None, False, False

    def recovered(self) -> None:
        """A probe worked: it is closed, but one failure opens it again, for longer, until a question has worked."""
        with self._lock:
            self._failures, self._until, self._probing, self.lasting = PATIENCE - 1, None, False, False

    def probe(self) -> bool:
        """Whether a probe is due; the caller that is told so makes it, and says how it went."""
        with self._lock:
            due = self._until is not None and not self._probing and self._clock() >= self._until
            self._probing = self._probing or due
            return due
