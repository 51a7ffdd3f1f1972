"""The benchmark behind `maskloss bench`: this library against others, on the same inputs, behind a check."""

from __future__ import annotations

from maskloss.lab.bench.command import DESCRIPTION, add_arguments, main

__all__ = ["DESCRIPTION", "add_arguments", "main"]
