"""Begin each page of the API reference that has several entries with a table of them."""

from __future__ import annotations

import re
from typing import Any

_ENTRY = re.compile(r"^\.\. (currentmodule|automodule|autoclass|autofunction|autoexception):: ([\w.]+)", re.MULTILINE)


def summarize(app: Any, docname: str, source: list[str]) -> None:
    if not docname.startswith("api/"):
        return
    names, module = [], ""
    for kind, name in _ENTRY.findall(source[0]):
        if kind.endswith("module"):
            module = f"{name}."
        else:
            names.append(name if name.startswith("maskloss.") else module + name)
    # Two classes of one name are told apart by their modules.
    short = "~" if len({name.rpartition(".")[2] for name in names}) == len(names) else ""
    if len(names) > 2:
        table = "\n".join(
            [
                "```{eval-rst}",
                ".. autosummary::",
                "   :nosignatures:",
                "",
                *(f"   {short}{name}" for name in names),
                "```",
            ]
        )
        source[0] = source[0].replace("```{eval-rst}", f"{table}\n\n```{{eval-rst}}", 1)


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", summarize)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
