"""Call the types of other projects by the names that their documentation has, so that intersphinx finds them."""

from __future__ import annotations

from typing import Any

PUBLIC = {
    "Axes": "matplotlib.axes.Axes",
    "Figure": "matplotlib.figure.Figure",
    "PathCollection": "matplotlib.collections.PathCollection",
    "Tensor": "torch.Tensor",
    "torch._C.Generator": "torch.Generator",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "typing_extensions.Unpack": "typing.Unpack",
}


def rename(app: Any, env: Any, node: Any, contnode: Any) -> None:
    node["reftarget"] = PUBLIC.get(node["reftarget"], node["reftarget"])


def setup(app: Any) -> dict[str, Any]:
    app.connect("missing-reference", rename, priority=100)  # before intersphinx
    return {"parallel_read_safe": True, "parallel_write_safe": True}
