"""Pages of HTML that carry their pictures along, and can be read on a telephone and in the dark."""

from __future__ import annotations

import base64
from importlib.resources import files
from pathlib import Path
from typing import Any

from maskloss.errors import require
from maskloss.lab.files import write_text


def write_page(path: Path, template: str, **content: Any) -> None:
    """Write a page whole. What is put into it is escaped, and a name that is missing is an error."""
    jinja = require("jinja2", "train")
    environment = jinja.Environment(
        autoescape=True,
        undefined=jinja.StrictUndefined,
        loader=jinja.FunctionLoader(lambda name: files(__package__).joinpath(name).read_text(encoding="utf-8")),
    )
    write_text(path, environment.get_template(template).render(**content))


def embedded(picture: bytes, kind: str) -> str:
    """Return the address of a picture that carries its content."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"
