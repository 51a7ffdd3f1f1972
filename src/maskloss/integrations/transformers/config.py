"""The configuration of a model in Transformers, by name or folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskloss.errors import Cause, require


def read_config(model: str) -> Any:
    """Read a configuration from a folder with config.json, or by its name on the Hugging Face Hub.

    Raises:
        MaskLossError: none was found, or Transformers does not know its type.
        MissingExtraError: Transformers is not installed (extra `transformers`).
    """
    transformers = require("transformers", "transformers")
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except Exception as error:  # noqa: BLE001 (a damaged file can make Transformers raise anything)
        text = " ".join(str(error).split()) or type(error).__name__
        local = Path(model).exists()
        raise Cause(
            "the model must have a configuration that Transformers can read",
            f"{model}: {text if len(text) <= 160 else text[:157] + '...'}",
            "a newer Transformers may know the model"
            if local
            else "name a folder with config.json, or a model on the Hub",
        ) from None
