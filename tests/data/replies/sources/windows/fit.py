"""Fits a line – slowly."""

RATE = 0.02
MOMENTUM = 0.0


def step(a, b, va, vb, points):
    """One step of gradient descent with “heavy ball” momentum."""
    errors = [(a * x + b - y, x) for x, y in points]
    va = MOMENTUM * va - RATE * sum(e * x for e, x in errors)
    vb = MOMENTUM * vb - RATE * sum(e for e, _ in errors)
    return a + va, b + vb, va, vb


def fit(points, steps):
    a = b = va = vb = 0.0
    for _ in range(steps):
        a, b, va, vb = step(a, b, va, vb, points)
    return a, b
