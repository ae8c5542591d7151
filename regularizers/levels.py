"""Every level. To add one, describe it in a file like those imported here, and add it to the table.

All measures that take what the level has (`Level.default_layers`) then apply there.
"""

from __future__ import annotations

from collections.abc import Mapping

from regularizers.attention import ATTENTION
from regularizers.level import Level
from regularizers.patch import PATCH
from regularizers.weight import WEIGHT

LEVELS: Mapping[str, Level] = {level.name: level for level in (PATCH, ATTENTION, WEIGHT)}
