"""Redundancy of vision transformers, measured head to toe: `python -m redundancy`, or `assess` in your own code.

Nothing is imported before it is asked for, so that the command line answers without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redundancy.assessment import assess
    from redundancy.examples import Look
    from redundancy.report import Report
else:
    _MODULES = {"assess": "assessment", "Look": "examples", "Report": "report"}

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"redundancy.{_MODULES[name]}"), name)


__all__ = ["Look", "Report", "assess"]
