"""Name the language of a page, and its translation, for browsers, screen readers and search engines.

On Chinese pages the theme's own words are Chinese too.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

_CHINESE = {
    "Back to top": "回到顶部",
    "Home": "首页",
    "Next": "下一页",
    "On this page": "本页内容",
    "Previous": "上一页",
    "Search": "搜索",
    "View this page": "查看本页源文件",
}
# Above the English pages in the navigation.
_CAPTIONS = {
    "Get started": "入门（英文）",
    "Understand": "理解（英文）",
    "Use": "使用（英文）",
    "Under the hood": "深入（英文）",
    "Reference": "参考（英文）",
}


def name_language(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    chinese = pagename.startswith("zh/")
    if chinese:
        context["language"] = "zh-Hans"
        context["gettext"] = lambda text: _CHINESE.get(text, text)  # what the templates ask
        for english_caption, caption in _CAPTIONS.items():
            tree = context["furo_navigation_tree"]
            context["furo_navigation_tree"] = tree.replace(f">{english_caption}</span>", f">{caption}</span>")
    # The first Chinese page does not follow the last English one.
    if pagename == "zh/index":
        context["prev"] = None
    elif not chinese and (context.get("next") or {}).get("link", "").startswith("zh/"):
        context["next"] = None
    english, translation = pagename.removeprefix("zh/"), f"zh/{pagename.removeprefix('zh/')}"
    if {english, translation} <= app.env.found_docs:
        for language, page in (("en", english), ("zh-Hans", translation), ("x-default", english)):
            # `pathto` says "#" of the page itself.
            address = f"{Path(page).name}.html" if page == pagename else context["pathto"](page)
            link = f'\n<link rel="alternate" hreflang="{language}" href="{escape(address)}">'
            context["metatags"] = context.get("metatags", "") + link


def setup(app: Any) -> dict[str, Any]:
    app.connect("html-page-context", name_language, priority=900)  # after the theme
    return {"parallel_read_safe": True, "parallel_write_safe": True}
