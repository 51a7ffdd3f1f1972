"""What `maskloss train` is made of: scenes, a compact query model, the training loop, evaluation and the report.

`load_run` uses a trained model from Python. In all rooms, what people and their files get wrong raises `Cause`, and a
package of an extra that is not installed raises `MissingExtraError`; commands print these as one sentence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskloss.lab.results.trained import FoundObjects, TrainedRun, load_run

__all__ = ["FoundObjects", "TrainedRun", "load_run"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: commands that do without it begin sooner."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from maskloss.lab.results import trained

    return getattr(trained, name)
