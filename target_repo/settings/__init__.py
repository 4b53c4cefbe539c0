"""Editable: the hyper-parameters of each preset, one a line, one file a preset."""

from settings.base import Settings


def settings(preset: str) -> Settings:
    """Hyper-parameters of ``preset``; sizes without a file of their own use those of h100, and mid those of cpu: what is
    found at that size can be tried again at this one."""
    if preset in ("cpu", "mid"):
        from settings.cpu import SETTINGS
    else:
        from settings.h100 import SETTINGS
    return SETTINGS
