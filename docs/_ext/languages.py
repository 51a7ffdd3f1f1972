"""Name the language of a page, so that browsers choose its fonts and screen readers its voice."""

from __future__ import annotations

from typing import Any


def name_language(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    if pagename.startswith("zh/"):
        context["language"] = "zh-Hans"


def setup(app: Any) -> dict[str, Any]:
    app.connect("html-page-context", name_language)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
