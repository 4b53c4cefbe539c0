"""DECIDES what to try, what to believe and what to merge. Never runs untrusted code itself."""

__version__ = "0.1.0"
