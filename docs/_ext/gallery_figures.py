"""Keep the figure that an example of the gallery has made, under the name `figure`."""

from __future__ import annotations

from textwrap import indent
from typing import Any

from sphinx_gallery.scrapers import figure_rst


def scrape(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    figure = block_vars["example_globals"].pop("figure", None)
    if figure is None:
        return ""
    path = next(block_vars["image_path_iterator"])
    figure.savefig(path, dpi=110, facecolor="white")
    image = figure_rst([path], gallery_conf["src_dir"], _described(figure))
    # In a container that scrolls on a phone.
    return f".. container:: scrolls\n\n{indent(image, '   ')}"


def _described(figure: Any) -> str:
    """Say what a figure shows, for those who do not see it: its titles, or what its axes measure."""
    titles = [axes.get_title(loc=where) for axes in figure.axes for where in ("center", "left")]
    named = [title for title in titles if title]
    return "; ".join(named or [f"{axes.get_ylabel()} against {axes.get_xlabel()}" for axes in figure.axes])


class Order:
    """The order of the pages: from the simplest to the special."""

    def __init__(self, src_dir: str) -> None:
        self.names = (
            "own_tensors",
            "module_from_scratch",
            "transformers",
            "rf_detr",
            "label_maps",
            "reading",
            "layouts",
        )

    def __call__(self, filename: str) -> int:
        return next((place for place, name in enumerate(self.names) if name in filename), len(self.names))
