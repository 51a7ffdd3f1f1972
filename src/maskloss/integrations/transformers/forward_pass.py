"""What a patched model remembers for the duration of one forward pass, and not longer.

The model's own hooks open and close the pass. It is kept for each thread, outside of the modules: so a copy or a
pickle of a model carries hooks, which are functions of this package, and no state, and replicas in other threads have
passes of their own. A second call of the same model inside the first ends the first's pass, and so does the next call
after an interrupt: what is left of the first then forms its masks densely, which is slower and the same.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from maskloss.errors import Cause, reported
from maskloss.integrations._targets import pack_masks
from maskloss.integrations.transformers.factors import Embeddings, SharedWork, with_final_masks
from maskloss.targets import MaskTargets

# The key of our hooks in a module's own tables. A number, as PyTorch gives, may be given again in a process that loads
# the model from a pickle, and the hook would be overwritten.
_KEY: Any = "maskloss"

# What the models call their targets; those of one row go together.
_TARGETS = (("mask_labels", "class_labels"), ("labels",))


@dataclass(eq=False)
class ForwardPass:
    """The state of one call of a model with targets."""

    training: bool  # whether the model trains, so that its mask head may hand over factors
    # the targets, as the criterion got them and as they were packed for its first call
    packed: tuple[Any, MaskTargets] | None = None
    shared: SharedWork = field(default_factory=SharedWork)  # the work that the layers' masks share
    members: WeakSet[nn.Module] = field(default_factory=WeakSet)  # the modules that look this pass up

    def pack(self, masks: Any, device: torch.device, ignore_value: int | None) -> MaskTargets:
        """Pack the masks, or return what was packed if this is the object of the last call."""
        if self.packed is None or self.packed[0] is not masks or self.packed[1].device != device:
            self.packed = masks, pack_masks(masks, device, ignore_value)
        return self.packed[1]


class _Passes(threading.local):
    def __init__(self) -> None:
        self.of: WeakKeyDictionary[nn.Module, ForwardPass] = WeakKeyDictionary()


_PASSES = _Passes()


def current(module: nn.Module) -> ForwardPass | None:
    """Find the pass of the model that a module belongs to; None outside of one, and while code is compiled."""
    return None if torch.compiler.is_compiling() else _PASSES.of.get(module)


@contextmanager
def opened(*modules: nn.Module) -> Iterator[None]:
    """Open a pass for modules of which the first is called by itself; inside another pass that one goes on."""
    if torch.compiler.is_compiling() or any(module in _PASSES.of for module in modules):
        yield
        return
    found = ForwardPass(training=False)
    for module in modules:
        _PASSES.of[module] = found
    try:
        yield
    finally:
        for module in modules:
            _PASSES.of.pop(module, None)


def watch(model: nn.Module) -> None:
    """Open a pass at every call of a model with targets, and close it at the end."""
    model._forward_pre_hooks[_KEY] = _begin
    model._forward_pre_hooks_with_kwargs[_KEY] = True
    _hook_outputs(model, _end)


def hand_over_factors(head: nn.Module) -> None:
    """Let a head's last module return embeddings that stay factors while its model trains with targets."""
    _hook_outputs(head, _hand_over)


def is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks of this package."""
    return _KEY in module._forward_hooks


def leave_alone(module: nn.Module) -> None:
    """Take the hooks of this package away."""
    tables: tuple[dict[Any, Any], ...] = (
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    )
    for table in tables:
        table.pop(_KEY, None)


def _hook_outputs(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Call a hook after a module, also if that raises, and before the hooks of others: they see what users see."""
    module._forward_hooks_with_kwargs[_KEY] = True
    module._forward_hooks_always_called[_KEY] = True
    module._forward_hooks[_KEY] = hook
    module._forward_hooks.move_to_end(_KEY, last=False)  # type: ignore[attr-defined]


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    _close(model)
    if not _targets_given(model, args, kwargs):
        return
    opened = _PASSES.of[model] = ForwardPass(model.training)
    # Looked for at every call: adapters and sharding may have wrapped or copied modules since the model was patched.
    for module in model.modules():
        if module is not model and (is_watched(module) or getattr(module, "remembers_masks", False)):
            opened.members.add(module)
            _PASSES.of[module] = opened


def _end(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    closed = None if torch.compiler.is_compiling() else _close(model)
    if closed is None or output is None or not closed.shared.handed:
        return None
    if not closed.shared.layers:
        _reject(model)
    return with_final_masks(output, closed.shared)


@reported("patch")
def _reject(model: nn.Module) -> None:
    raise Cause(
        "with factors=True the model must compute its masks as one product",
        f"the {type(model).__name__} of this version of Transformers computes them in another way",
        "update Transformers, or patch without factors",
    )


def _hand_over(head: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    found = current(head)
    factored = found is not None and found.training and isinstance(output, Tensor)
    return Embeddings.wait(output, found.shared) if found is not None and factored else None


def _close(model: nn.Module) -> ForwardPass | None:
    closed = _PASSES.of.pop(model, None)
    if closed is not None:
        for module in closed.members:
            _PASSES.of.pop(module, None)
        closed.packed = None
        closed.shared.clear()
    return closed


def _targets_given(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    kind: Any = type(model)
    given = dict(zip(_parameters(kind), args, strict=False)) | dict(kwargs)
    return any(all(given.get(name) is not None for name in names) for names in _TARGETS)


@functools.lru_cache(maxsize=32)
def _parameters(kind: Any) -> tuple[str, ...]:
    """Name the positional arguments of a model's call."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]
