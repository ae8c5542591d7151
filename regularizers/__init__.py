"""Diversity terms: measures of redundancy (`measures.py`), each applied at some level (`levels.py`).

Nothing is imported before it is asked for, so that `regularizers.catalogue` answers without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regularizers.diversity import Diversity, Term, total
    from regularizers.measures import MEASURES
    from regularizers.registry import Measure
    from regularizers.specs import REFERENCE_FLAGS, Spec, parse_spec
else:
    _MODULES = {
        **dict.fromkeys(("Diversity", "Term", "total"), "diversity"),
        **dict.fromkeys(("REFERENCE_FLAGS", "Spec", "parse_spec"), "specs"),
        "MEASURES": "measures",
        "Measure": "registry",
    }

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # what an import statement calls, since torch.hub has these modules under other names (hubconf.py)
        return getattr(__import__(f"regularizers.{_MODULES[name]}", fromlist=[name]), name)


__all__ = ["MEASURES", "REFERENCE_FLAGS", "Diversity", "Measure", "Spec", "Term", "parse_spec", "total"]
