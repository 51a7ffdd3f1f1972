"""Formulas as MathML, which browsers render natively: no script, no font server, readable offline."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

# Bars around something are brackets, and a function's name is a name: both without the space of an infix operator.
_MENDS = (
    (re.compile(r"(<mrow>\s*)<mo>\|</mo>"), r'\1<mo form="prefix" stretchy="false">|</mo>'),
    (re.compile(r"<mo>\|</mo>(\s*</mrow>)"), r'<mo form="postfix" stretchy="false">|</mo>\1'),
    (re.compile(r"<mo>(max|min)</mo>"), r"<mi>\1</mi>"),
)


def _formula(tex: str, *, as_block: bool) -> str:
    xml = tex2mathml(tex, as_block=as_block)
    for pattern, replacement in _MENDS:
        xml = pattern.sub(replacement, xml)
    return xml


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(_formula(node.astext(), as_block=False))
    raise nodes.SkipNode


def _block(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{_formula(node.astext(), as_block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
