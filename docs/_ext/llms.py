"""Write `llms.txt`, a list of all pages for language models, and the Markdown of each page beside its HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes


def first_sentence(doctree: nodes.document) -> str:
    """The first sentence of a page's text, in one line."""
    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        # Not the link to the page's translation, and no note.
        if len(text) > 20 and not isinstance(paragraph.parent, nodes.Admonition):
            return text.partition(". ")[0].rstrip(".:") + "."
    return ""


def write_pages(app: Any, exception: Exception | None) -> None:
    if exception or app.builder.name != "html":
        return
    lines = ["# maskloss", "", f"> {app.config.llms_description}"]
    for caption, pages in sections(app):
        lines += ["", f"## {caption}", ""]
        for page in pages:
            source = Path(app.env.doc2path(page))
            title = app.env.titles[page].astext()
            if source.suffix == ".md":
                target = Path(app.outdir, f"{page}.md")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
            # Pages of the gallery are no Markdown; their sources are there anyway.
            address = f"{page}.md" if source.suffix == ".md" else f"_sources/{page}{source.suffix}.txt"
            lines.append(f"- [{title}]({address}): {first_sentence(app.env.get_doctree(page))}")
    Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def sections(app: Any) -> list[tuple[str, list[str]]]:
    """Pages of each table of contents of the front page, those below them included."""
    from sphinx.addnodes import toctree

    def below(page: str) -> list[str]:
        return [page, *(each for child in app.env.toctree_includes.get(page, ()) for each in below(child))]

    found = []
    for tree in app.env.get_doctree(app.config.root_doc).findall(toctree):
        pages = [each for _, page in tree["entries"] for each in below(page)]
        found.append((tree["caption"] or "Pages", pages))
    return found


def setup(app: Any) -> dict[str, Any]:
    app.add_config_value("llms_description", "", "html", types=frozenset({str}))
    app.connect("build-finished", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
