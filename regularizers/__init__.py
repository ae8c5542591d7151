"""Diversity terms: seven measures (`measures.py`) at three levels (`patch.py`, `attention.py`, `weight.py`)."""

from regularizers.diversity import Diversity, Term, total
from regularizers.measures import MEASURES, Measure
from regularizers.specs import REFERENCE_FLAGS, Spec, parse_spec

__all__ = ["MEASURES", "REFERENCE_FLAGS", "Diversity", "Measure", "Spec", "Term", "parse_spec", "total"]
