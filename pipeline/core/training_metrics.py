"""metrics.jsonl as all read it: its name, and which of its lines tell how a training ended. No torch.

docs/training.md explains the lines, training/watch.py writes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

METRICS_FILE = "metrics.jsonl"
LAST_FRACTION = 0.1  # of the lines of whole batches, which a training's last values are means of


def finite(value: Any) -> float | None:
    """The value where it is a finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def whole_batches(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines whose chance_loss is not below the training's largest.

    A smaller batch, as the last one may be, has fewer candidates: its loss is less for that alone.
    """
    chances = [finite(line.get("chance_loss")) for line in lines]
    most = max((chance for chance in chances if chance is not None), default=None)
    return [line for line, chance in zip(lines, chances, strict=True) if chance is None or chance == most]


def last_mean(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """A value's mean over the last tenth of the lines of whole batches, of those that have it; None where none has."""
    whole = whole_batches(lines)
    num = math.ceil(LAST_FRACTION * len(whole))
    values = [value for line in whole[len(whole) - num :] if (value := finite(line.get(name))) is not None]
    return sum(values) / len(values) if values else None
