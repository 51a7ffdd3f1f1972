"""Counting what a step asks of PyTorch: tensor operations, and waits of the host for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskloss.ops import WIDEST_ON_DEVICE

# Operations whose result depends on values: the host waits for the device to know a number or a shape.
_VALUE_DEPENDENT = frozenset((
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim",
))  # fmt: skip
# Operations that pass a tensor on and touch no memory.
_FREE = frozenset({"alias", "detach", "detach_", "lift_fresh"})
_COPIES = frozenset({"_to_copy", "copy_"})
_INDEXING = frozenset({"index", "index_put", "index_put_"})
# Calls that hand a tensor to the host. On a CPU they copy nothing, so no operation of their own shows.
_READS = frozenset({"cpu", "numpy", "tolist", "__array__"})
_MAKERS = frozenset({torch.tensor, torch.as_tensor})
_HOST = "_bench_on_host"


class StepCounter:
    """Counts the operations of the calls inside it, forward and backward.

    Operations are what reaches PyTorch's dispatcher, views included, also inside an operation of `maskloss` that is
    made of others (the reference backend is); a compiled kernel counts as the one operation that it is. Operations that
    PyTorch itself makes of others count as those, and `detach` and its like do not count.

    Transfers are the times at which a host waits for a GPU. On a GPU these are copies from it and operations whose
    result depends on values (`item`, `nonzero`, indexing with a mask). On a CPU the same ones are counted, and because
    a copy from CPU to CPU does not happen, so are the calls that would make it (`cpu`, `numpy`, `tolist`), except of a
    tensor that was made on the host or brought there before. What Numba kernels read is not counted: the GPU kernels in
    their place read nothing. The same holds for an assignment that a GPU would solve. One that the host would solve,
    after the reference backend or for very large problems, counts as one: all costs and labels go there in one copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.operations: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()
        modes: list[Any] = [_Calls(self)] if device.type == "cpu" else []
        self._modes = [*modes, _Operations(self, device)]

    def __enter__(self) -> StepCounter:  # noqa: PYI034 (Self is newer than Python 3.10)
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def as_dict(self) -> dict[str, Any]:
        """Return totals, and how often the most frequent operations ran."""
        return {
            "operations": self.operations.total(),
            "transfers": self.transfers.total(),
            "most_frequent": dict(self.operations.most_common(12)),
            "transfers_by": dict(self.transfers),
        }


class _Operations(TorchDispatchMode):
    def __init__(self, counter: StepCounter, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter, self.device = counter, device
        self.blind = 0
        # That of the costs that were computed last.
        self.backend = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        if name not in _FREE:
            self.counter.operations[f"{namespace}::{name}"] += 1
        if namespace != "maskloss":
            if not self.blind and self._waits(name, args, kwargs):
                self.counter.transfers[name] += 1
            return func(*args, **kwargs)
        on_cpu = self.device.type == "cpu"
        if name.endswith("match_cost"):
            self.backend = args[-1]
        if on_cpu and name == "assign" and self._solved_on_host(args[0], args[-1]):
            self.counter.transfers[name] += 1
        hidden = on_cpu and (name == "assign" or "cpu" in args)
        self.blind += hidden
        # Straight to the kernel, past this mode, which is on again for what the kernel calls.
        key = torch._C.DispatchKey.CPU if on_cpu else torch._C.DispatchKey.CUDA
        try:
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        finally:
            self.blind -= hidden

    def _solved_on_host(self, cost: Tensor, groups: int) -> bool:
        return self.backend == "reference" or max(cost.shape[2] // groups, cost.shape[3]) > WIDEST_ON_DEVICE

    def _waits(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if name in _COPIES and self.device.type != "cpu":
            return _copies_to_host(name, args, kwargs)
        if name in _INDEXING:
            indices = [each for each in args[1] if each is not None]
            return any(each.dtype in (torch.bool, torch.uint8) and self._is_away(each) for each in indices)
        return name in _VALUE_DEPENDENT and any(self._is_away(each) for each in _tensors(args))

    def _is_away(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device.type and not hasattr(tensor, _HOST)


class _Calls(TorchFunctionMode):
    """Sees the reads that cost nothing on a CPU, and keeps track of which tensors would live on the host."""

    def __init__(self, counter: StepCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        name = getattr(func, "__name__", "")
        read = name in _READS or (name == "to" and _names_cpu(args[1:], kwargs))
        if read and not hasattr(given[0], _HOST):
            self.counter.transfers[name] += 1
        result = func(*args, **kwargs)
        made_here = func in _MAKERS and kwargs.get("device") is None and not given
        if read and isinstance(result, Tensor):
            result = result.view_as(result)  # the same memory, but not the tensor that stays where it was
        if read or made_here or (given and all(hasattr(each, _HOST) for each in given)):
            for each in _tensors(result):
                setattr(each, _HOST, True)
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _names_cpu(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the device is the CPU by name: a device taken from a tensor may be any."""
    return "cpu" in [value for value in (*args, *kwargs.values()) if isinstance(value, str)]


def _copies_to_host(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if name == "copy_":
        source, target = args[1].device.type, args[0].device.type
    else:
        device = kwargs.get("device")
        source, target = args[0].device.type, args[0].device.type if device is None else torch.device(device).type
    return bool(source != "cpu" and target == "cpu")
