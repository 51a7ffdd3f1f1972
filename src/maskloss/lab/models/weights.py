"""Weights on the disk: files of safetensors, which run no code when they are read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from maskloss.errors import Cause, require
from maskloss.lab import files


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of safetensors."""
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(str(path), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise Cause(
            "weights must be a file of safetensors", f"{path}: {files.explain(error)}", "it is damaged"
        ) from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of safetensors whole."""
    files.write_whole(path, lambda partial: write_tensors(partial, tensors))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of safetensors in place, and wait until it is on the disk."""
    # Copies, since safetensors refuses tensors that share memory, as tied weights do.
    held = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    try:
        require("safetensors.torch", "train").save_file(held, str(path))
    except require("safetensors", "train").SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    files.flush_file(path)


def load_weights(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Put saved weights into a model."""
    rule = "saved weights must be those of the model"
    own = network.state_dict()
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"holds {unknown[0]}, which the model does not have"
        raise Cause(rule, f"{where} {what}", "it belongs to another run")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise Cause(
                rule,
                f"{where} holds {name} as {list(tensor.shape)}, the model has {list(own[name].shape)}",
                "it belongs to another run",
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise Cause(rule, f"{where}: {name} holds numbers that are not finite", "go back to an older checkpoint")
    network.load_state_dict(dict(state))
