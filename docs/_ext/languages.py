"""Name the language of a page, and its translation, for browsers, screen readers and search engines."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any


def name_language(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    chinese = pagename.startswith("zh/")
    if chinese:
        context["language"] = "zh-Hans"
    english, translation = pagename.removeprefix("zh/"), f"zh/{pagename.removeprefix('zh/')}"
    if {english, translation} <= app.env.found_docs:
        for language, page in (("en", english), ("zh-Hans", translation), ("x-default", english)):
            # `pathto` says "#" of the page itself.
            address = f"{Path(page).name}.html" if page == pagename else context["pathto"](page)
            link = f'\n<link rel="alternate" hreflang="{language}" href="{escape(address)}">'
            context["metatags"] = context.get("metatags", "") + link


def setup(app: Any) -> dict[str, Any]:
    app.connect("html-page-context", name_language)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
