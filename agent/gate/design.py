"""Weighing designs: which candidates are on in which run, and what the runs then say about each.

Every candidate is on in half of the rows, so that each row tells of all of them: the effect of one of up to N - 1
candidates has variance 4 / N runs (Hotelling 1944; Plackett and Burman 1946). No baseline is needed, and what drifts
with time averages out since rows come in random order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.int64]
ORDERS = (4, 8, 12, 16)


def hadamard(order: int) -> Matrix:
    """An order x order matrix of +-1 with orthogonal columns, the first of ones: Paley's construction over the
    quadratic residues for 12, Sylvester's doubling otherwise. Raises ValueError for an order not in ``ORDERS``."""
    if order not in ORDERS:
        raise ValueError(f"no design of {order} rows")
    if order != 12:
        made = np.ones((1, 1), np.int64)
        while len(made) < order:
            made = np.block([[made, made], [made, -made]])
        return made
    prime = order - 1
    squares = {i * i % prime for i in range(1, prime)}
    core = np.array([[1 if i == j or (j - i) % prime in squares else -1 for j in range(prime)]
                     for i in range(prime)])
    made = np.ones((order, order), np.int64)
    made[1:, 1:] = core
    made[0, 1:] = -1
    return np.ascontiguousarray(made)


def rows_for(candidates: int, most: int) -> int:
    """Rows of the smallest design that holds so many candidates, at most ``most``."""
    return next((order for order in ORDERS if order > candidates or order >= most), ORDERS[-1])


def design(candidates: int, rows: int, rng: random.Random) -> Matrix:
    """rows x candidates matrix of +-1 (+1: on): random columns of ``hadamard(rows)`` without the constant one, in
    random order of rows. Raises ValueError when the candidates do not fit."""
    if not 0 < candidates < rows:
        raise ValueError(f"{candidates} candidates do not fit in {rows} rows")
    columns = rng.sample(range(1, rows), candidates)
    order = rng.sample(range(rows), rows)
    return np.ascontiguousarray(hadamard(rows)[np.ix_(order, columns)])


@dataclass(frozen=True, slots=True)
class Weighed:
    """What a design's runs said. ``information`` is the reciprocal variance of a gain, in runs."""

    gains: tuple[float, ...]
    information: tuple[float, ...]
    off: float
    """Fitted loss with every candidate off."""
    off_weight: float
    squares: float
    """Residual sum of squares."""
    degrees: int


def solve(on: Matrix, losses: Sequence[float]) -> Weighed | None:
    """Least squares of main effects. None when the rows that are left do not tell every candidate apart."""
    count, width = on.shape
    x = np.hstack([np.ones((count, 1)), on / 2])
    y = np.asarray(losses, float)
    if count <= width or np.linalg.matrix_rank(x) <= width:
        return None
    inverse = np.linalg.inv(x.T @ x)
    fit = inverse @ (x.T @ y)
    none = np.concatenate([[1.0], np.full(width, -0.5)])
    residuals = y - x @ fit
    return Weighed(tuple((-fit[1:]).tolist()), tuple((1 / np.diag(inverse)[1:]).tolist()), float(none @ fit),
                   float(1 / (none @ inverse @ none)), math.fsum((residuals ** 2).tolist()), count - width - 1)


def blamed(on: Matrix, failed: Sequence[bool]) -> list[int]:
    """Candidates that are on in every failed row and off in every good one; none without a failed row."""
    bad = np.asarray(failed, bool)
    if not bad.any():
        return []
    return [column for column in range(on.shape[1]) if (on[bad, column] > 0).all() and (on[~bad, column] < 0).all()]
