"""Run as a program: a training step on CUDA, MPS and XPU tensors of a machine that has none of them.

The tensors are fake: they have a device, a dtype and a shape, and no values, so whoever looks at one gets an error.
Indexing asks PyTorch for the guard of the device, which a build without that device lacks; it gets the guard of the
meta device, which does nothing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskloss import ClipOptions, MaskCriterion, MaskFactors, MaskTargets, graphs
from maskloss._abi import INDEX_COLUMNS, Draw, Factors, Gradients, Instances, Job, Targets, Term
from maskloss.ops import choose_backend, factored, reference

# Places in c10::DeviceType.
CUDA, XPU, MPS, META = 1, 12, 13, 14
LAYERS, BATCH, QUERIES, TARGETS, CLASSES, SIZE = 10, 2, 100, 20, 80, 64
SAMPLING = (112, 336, 84)


def lend_guards() -> None:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    for device in (CUDA, XPU, MPS):
        registry[device] = registry[device] or registry[META]


class Watch(TorchDispatchMode):
    """Notes the copies between devices, those of them that wait, and the dtypes that were computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[str, ...]] = []
        self.waits: list[str] = []
        self.operations: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(each) if isinstance(t, Tensor)] for each in ((args, kwargs), result))
        devices = {tensor.device.type for tensor in (*given, *made)}
        self.operations.add(func._schema.name)
        if "copy" in func._schema.name and len(devices) > 1:
            self.copies.append((given[0].device.type, made[0].device.type))
            if not (kwargs or {}).get("non_blocking"):
                self.waits.append(func._schema.name)
        self.dtypes |= {tensor.dtype for tensor in made}
        return result


@contextmanager
def watched() -> Iterator[Watch]:
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        yield watch


def masks(device: str) -> list[Tensor]:
    return [torch.empty(TARGETS, 2 * SIZE, 2 * SIZE + 3, dtype=torch.bool, device=device) for _ in range(BATCH)]


def predictions(device: str) -> tuple[list[Tensor], list[Tensor]]:
    classes = [torch.empty(BATCH, QUERIES, CLASSES + 1, device=device, requires_grad=True) for _ in range(LAYERS)]
    logits = [torch.empty(BATCH, QUERIES, SIZE, SIZE, device=device, requires_grad=True) for _ in range(LAYERS)]
    return classes, logits


def entries(packed: bool) -> list[dict[str, Any]]:
    labels = [torch.empty(TARGETS, dtype=torch.int64, device="cuda") for _ in range(BATCH)]
    forms: list[Any] = [MaskTargets.from_masks(each) if packed else each for each in masks("cuda")]
    return [{"masks": form, "labels": label} for form, label in zip(forms, labels, strict=True)]


def criterion_copies_nothing() -> None:
    """Packed targets: nothing moves. Dense ones: their description goes to the device."""
    for packed, copies in ((True, []), (False, [("cpu", "cuda")])):
        with watched() as watch:
            targets = entries(packed)
            watch.copies.clear()
            out = MaskCriterion(CLASSES)(*predictions("cuda"), targets)
        assert watch.copies == copies, (packed, watch.copies)
        # This operation does not look at values; the other one does, and makes the trip inside.
        assert "maskloss::assign_on_device" in watch.operations
        assert "maskloss::assign" not in watch.operations
        assert out.total.device.type == "cuda"
        assert out.total.requires_grad


def volumes_copy_nothing() -> None:
    """Nor do clips whose frames are one unit; neither waits."""
    with watched() as watch:
        dense = [torch.empty(TARGETS, 3, 2 * SIZE, 2 * SIZE, dtype=torch.bool, device="cuda") for _ in range(BATCH)]
        labels = [torch.empty(TARGETS, dtype=torch.int64, device="cuda") for _ in range(BATCH)]
        packed = [MaskTargets.from_masks(each) for each in dense]
        classes, _ = predictions("cuda")
        shape = (BATCH, QUERIES, 3, SIZE, SIZE)
        logits = [torch.empty(shape, device="cuda", requires_grad=True) for _ in range(LAYERS)]
        targets = [{"masks": masks, "labels": each} for masks, each in zip(packed, labels, strict=True)]
        watch.copies.clear()
        for unit in ("clip", "volume"):
            out = MaskCriterion(CLASSES, clips=ClipOptions(unit=unit))(classes, logits, targets)
            assert out.total.requires_grad
    assert not watch.copies, watch.copies
    assert not watch.operations & {"aten::_local_scalar_dense", "aten::nonzero", "aten::item"}


def uneven_layers_do_not_wait() -> None:
    """A layer without masks, weights, what is said of masks and labels on the host: small copies, and no waiting."""
    with watched() as watch:
        classes, logits = predictions("cuda")
        flags = torch.ones(TARGETS, dtype=torch.bool)
        numbers: Any = [0] * TARGETS
        packed = [{"masks": MaskTargets.from_masks(each), "labels": numbers} for each in masks("cuda")]
        weights = [torch.empty(TARGETS, device="cuda") for _ in range(BATCH)]
        watch.waits.clear()
        targets = [each | {"has_mask": flags} for each in packed]
        MaskCriterion(CLASSES)(classes, [None, *logits[1:]], targets, instance_weights=weights)
    assert not watch.waits, watch.waits


def padded_targets_copy_nothing() -> None:
    """A step that is to be captured: a seed and padded targets on the device, for dense logits and for factors."""
    with watched() as watch:
        packed = MaskTargets.from_masks(masks("cuda"))
        labels, counts, seed = (
            torch.empty(shape, dtype=torch.int64, device="cuda") for shape in ((BATCH * TARGETS,), (BATCH,), ())
        )
        targets = graphs.PaddedTargets(packed, labels, counts)
        classes, logits = predictions("cuda")
        features = torch.empty(BATCH, 32, SIZE, SIZE, device="cuda", requires_grad=True)
        factors = [MaskFactors(torch.empty(BATCH, QUERIES, 32, device="cuda"), features) for _ in range(LAYERS)]
        watch.copies.clear()
        for masks_ in (logits, factors):
            out = graphs.padded_loss(MaskCriterion(CLASSES).cuda(), classes, masks_, targets, seed=seed)
            assert out.total.device.type == "cuda"
            assert out.total.requires_grad
    # Ids of the images follow from their number, and are made on the device.
    assert not watch.copies, watch.copies
    assert not watch.operations & {"aten::_local_scalar_dense", "aten::nonzero", "aten::item"}


def factors_copy_nothing() -> None:
    """A step with masks as factors makes the trips of one with dense logits, and its operations none by themselves."""
    with watched() as watch:
        features = torch.empty(BATCH, 32, SIZE, SIZE, device="cuda", requires_grad=True)
        layers = [
            MaskFactors(torch.empty(BATCH, QUERIES, 32, device="cuda", requires_grad=True), features, 0.5)
            for _ in range(LAYERS)
        ]
        targets = entries(packed=True)
        watch.copies.clear()
        out = MaskCriterion(CLASSES)(predictions("cuda")[0], layers, targets)
    assert not watch.copies, watch.copies
    assert out.total.requires_grad
    _factored_operations_copy_nothing()


def _factored_operations_copy_nothing() -> None:
    """The same inside the operations, with Triton's launches left out: no value is read, nothing changes devices."""
    from contextlib import nullcontext

    from triton.runtime.jit import JITFunction

    from maskloss.ops import gpu
    from maskloss.ops.gpu import assignment, cost, loss
    from maskloss.ops.gpu import features as sampling

    JITFunction.run = lambda *_, **__: None  # type: ignore[method-assign]
    for module in (gpu, assignment, cost, loss, sampling):
        module.on_device = lambda _: nullcontext()  # type: ignore[attr-defined]
    for dtype in (torch.float32, torch.bfloat16):
        with watched() as watch, torch.no_grad():
            like = {"dtype": dtype, "device": "cuda"}
            rows = [torch.empty(BATCH, QUERIES, 32, **like) for _ in range(LAYERS)]
            biases = [torch.empty(BATCH, QUERIES, **like) for _ in range(LAYERS)]
            features = [torch.empty(BATCH, 32, SIZE, SIZE, **like) for _ in range(2)]
            scratch = 7 * SIZE * SIZE * dtype.itemsize
            factors = Factors(rows, biases, features, [0] * (LAYERS - 1) + [1], scratch)
            targets = MaskTargets.from_masks(masks("cuda"))
            group = Targets("bits", *targets.tensors)
            index = torch.empty(LAYERS * BATCH * TARGETS, INDEX_COLUMNS, dtype=torch.int64, device="cuda")
            ids = torch.arange(BATCH, device="cuda")
            draw, term = Draw(ids, torch.empty((), dtype=torch.int64, device="cuda"), *SAMPLING), Term()
            job = Job(group, draw, term)
            products = (factors, index, [TARGETS] * (LAYERS * BATCH), job)
            watch.copies.clear()
            costs = torch.empty(LAYERS, BATCH, QUERIES, TARGETS, device="cuda")
            labels = torch.empty(BATCH * TARGETS, dtype=torch.int64, device="cuda")
            gpu.assign(costs, labels, targets.images, targets.num_targets, CLASSES, 5)
            factored.match_cost(gpu, factors, targets.num_targets, job)
            *terms, kept = factored.mask_loss(gpu, *products)
            factored.mask_loss_backward(gpu, Gradients(*terms), kept, *products, [True] * 4)
        assert not watch.copies, watch.copies


def step_compiles_to_one_graph() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode(allow_non_fake_inputs=True):
        targets, seed = entries(packed=True), torch.empty((), dtype=torch.int64)
        step = torch.compile(MaskCriterion(CLASSES), fullgraph=True, backend=keep)
        out = step(*predictions("cuda"), targets, seed=seed)
    assert out.total.device.type == "cuda"
    assert out.total.requires_grad
    (graph,) = graphs
    nodes = {str(node.target): node for node in graph.graph.nodes if "maskloss" in str(node.target)}
    assert sorted(nodes) == [f"maskloss.{name}.default" for name in ("assign_on_device", "mask_loss", "match_cost")]
    backend = choose_backend(torch.device("cuda"))
    for name in ("mask_loss", "match_cost"):
        assert nodes[f"maskloss.{name}.default"].args[-1] == backend


def reference_stays_on(device: str) -> None:
    """The reference backend, called with tensors of that device and a seed on the host, makes no trip."""
    with watched() as watch, torch.no_grad():
        targets = MaskTargets.from_masks(masks(device), ignore=torch.empty(2 * SIZE, 2 * SIZE + 3, device=device) > 0)
        _, logits = predictions(device)
        ids, count = torch.arange(BATCH, device=device), LAYERS * BATCH * TARGETS
        index = torch.empty(count, INDEX_COLUMNS, dtype=torch.int64, device=device)
        instances = Instances(logits, index, [BATCH * TARGETS] * LAYERS)
        draw, group = Draw(ids, torch.tensor(5), *SAMPLING), Targets("bits", *targets.tensors)
        job = Job(group, draw, Term(alpha=0.25, gamma=2.0))
        watch.copies.clear()
        reference.match_cost(logits, targets.num_targets, job)
        reference.uncertain_points(instances, draw, targets.windows, "zeros")
        ce, dice, saved = reference.mask_loss(instances, job)
        reference.mask_loss_backward(Gradients(ce, dice), saved, instances, job, [True] * LAYERS)
    assert not watch.copies, watch.copies
    assert device != "mps" or torch.float64 not in watch.dtypes


CHECKS: dict[str, Callable[[], None]] = {
    "criterion": criterion_copies_nothing,
    "compile": step_compiles_to_one_graph,
    "uneven": uneven_layers_do_not_wait,
    "volumes": volumes_copy_nothing,
    "padded": padded_targets_copy_nothing,
    "factors": factors_copy_nothing,
}

if __name__ == "__main__":
    lend_guards()
    for name in sys.argv[1:]:
        CHECKS.get(name, partial(reference_stays_on, name))()
