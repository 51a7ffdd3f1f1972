"""Keep the figure that an example of the gallery has made, under the name `figure`."""

from __future__ import annotations

from typing import Any

from sphinx_gallery.scrapers import figure_rst


def scrape(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    figure = block_vars["example_globals"].pop("figure", None)
    if figure is None:
        return ""
    path = next(block_vars["image_path_iterator"])
    figure.savefig(path, dpi=110, facecolor="white")
    return figure_rst([path], gallery_conf["src_dir"])


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
