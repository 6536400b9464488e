"""Named places of the test harness at which it makes the machine fail: a full disk, a killed process, a NaN.

The workers of tests/support wrap what the program does, a step or a call to the disk, with `reach`. A test installs a
function that is told the seam's name and the value that passes, and raises, kills, waits, or returns another value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Value = TypeVar("Value")
Fault = Callable[[str, Any], Any]

_fault: Fault | None = None  # global, because a fault must reach every depth of the program without being passed along


def install(fault: Fault | None) -> None:
    """Let `fault(site, value)` act at every seam from now on; None takes it away."""
    global _fault
    _fault = fault


def reach(site: str, value: Value = None) -> Value:
    """Pass the seam named `site` with `value`, which comes back unchanged unless a fault is installed."""
    return value if _fault is None else _fault(site, value)
