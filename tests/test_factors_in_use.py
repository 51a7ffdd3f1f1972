"""Masks as factors in a training step: memory, autocast, checkpoints, the compiler, ranks, and errors."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from maskloss import MaskCriterion, MaskFactors, MaskLoss, MaskLossError, MaskTargets, PointSampling, step_totals
from maskloss.ops import factored
from support.products import BATCH, CHANNELS, FEW, QUERIES, Step, leaf, some_factors, some_matches, some_targets

LARGE = (9, 13)


def classes(depth: int, batch: int = BATCH, queries: int = QUERIES) -> list[Tensor]:
    return [torch.randn(batch, queries, 4).requires_grad_() for _ in range(depth)]


def entries(targets: MaskTargets) -> dict[str, Any]:
    return {"masks": targets, "labels": [torch.randint(3, (count,)) for count in targets.num_targets]}


def criterion(backend: str = "cpu", **options: Any) -> MaskCriterion:
    return MaskCriterion(3, **{"sampling": FEW, "backend": backend, **options})


# ----- --------------------------------------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """The largest result of any operation, in elements; views of nothing new count as well."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                # A plane that is expanded over the images has no memory of its own.
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_logits_is_made(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, size, depth = 100, (64, 64), 3
    targets = some_targets(counts=(2, 3), size=(40, 40))
    work = Step(
        list(some_factors([size] * depth, dtype, queries=queries, scratch_mb=0.05)),
        some_matches(targets, queries, depth),
        targets,
    )
    logits, collated = classes(depth, queries=queries), entries(targets)
    all_logits = BATCH * queries * size[0] * size[1]
    loss = criterion(sampling=PointSampling(num_points=500))
    watch = Largest()

    def seen_within(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with watch:  # inside the operation, where the mode around the step does not look
                return operation(*args, **kwargs)

        return run

    for name in ("match_cost", "mask_loss", "mask_loss_backward"):
        monkeypatch.setattr(factored, name, seen_within(getattr(factored, name)))

    def training_step() -> None:
        out = loss(logits, work.layers, collated, seed=0)
        torch.autograd.grad(out.total, [*logits, *work.leaves])

    training_step()  # kernels compile
    tracemalloc.start()
    try:
        with watch:
            training_step()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    features = BATCH * CHANNELS * size[0] * size[1]
    assert features <= watch.elements < all_logits / 8
    # What NumPy allocates for the kernels: the features and targets at the points, and work space for a plane or two.
    assert peak < all_logits * dtype.itemsize / 4
    monkeypatch.undo()
    dense = Largest()
    with dense:
        loss(logits, work.dense(), collated, seed=0)
    assert dense.elements >= all_logits  # the watch would have seen it


@pytest.mark.parametrize(("scratch_mb", "planes"), [(1e-6, 1), (2.5 * 9 * 13 * 4 / 2**20, 2), (1.0, 6)])
def test_the_scratch_memory_is_bounded(scratch_mb: float, planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from maskloss.ops import cpu

    targets = some_targets(counts=(3, 1))
    work = Step(list(some_factors([LARGE] * 2, scratch_mb=scratch_mb)), some_matches(targets, layers=2), targets)
    seen: list[int] = []
    for name in ("mask_loss", "plane_gradients"):
        original = getattr(cpu, name)

        def run(*args: Any, original: Any = original, **options: Any) -> Any:
            instances = next(each for each in args if hasattr(each, "logits") and hasattr(each, "rows"))
            seen.append(instances.logits[0].shape[1])
            return original(*args, **options)

        monkeypatch.setattr(cpu, name, run)
    work.results()
    assert max(seen) == planes
    assert sum(seen) == 2 * len(work.matches)


# ----- ------------------------------------------------------------------------------------------------ mixed precision


@pytest.mark.parametrize("kinds", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_autocast(kinds: tuple[torch.dtype, torch.dtype]) -> None:
    embeddings = [leaf(BATCH, QUERIES, CHANNELS, dtype=kinds[0]) for _ in range(2)]
    features, bias = leaf(BATCH, CHANNELS, *LARGE, dtype=kinds[1]), leaf(QUERIES, dtype=torch.float32)
    targets, logits = entries(some_targets()), classes(2)
    layers = [MaskFactors(each, features, bias) for each in embeddings]
    leaves = [*embeddings, features, bias]
    matches = some_matches(targets["masks"])
    with torch.autocast("cpu", torch.bfloat16):
        assert layers[0].dtype == torch.bfloat16
        mine = criterion()(logits, layers, targets, matches=matches, seed=1)
        theirs = criterion()(logits, [each.dense() for each in layers], targets, matches=matches, seed=1)
    torch.testing.assert_close(mine.total, theirs.total, atol=0.02, rtol=0.02)
    assert mine.loss_mask.dtype == torch.float32
    found, wanted = (torch.autograd.grad(out.total, leaves) for out in (mine, theirs))
    for each, other, origin in zip(found, wanted, leaves, strict=True):
        assert each.dtype == origin.dtype
        scale = float(other.abs().max())
        assert float((each - other).abs().max()) <= 0.05 * scale


def test_autocast_around_the_backward_pass_rounds_nothing() -> None:
    targets = some_targets()
    work = Step(list(some_factors([LARGE])), some_matches(targets), targets)
    ce, dice = work.terms()
    total = ce.sum() + dice.sum()
    plain = torch.autograd.grad(total, work.leaves, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(total, work.leaves)
    for each, other in zip(inside, plain, strict=True):
        assert torch.equal(each, other)


# --- ---------------------------------------------------------------------------------------- checkpoints, the compiler


def test_checkpointing() -> None:
    embeddings, features = (
        leaf(BATCH, QUERIES, CHANNELS, dtype=torch.float32),
        leaf(BATCH, CHANNELS, *LARGE, dtype=torch.float32),
    )
    targets, logits = entries(some_targets()), classes(1)

    def total(embeddings: Tensor, features: Tensor) -> Tensor:
        result: Tensor = criterion()(logits, [MaskFactors(embeddings, features * 2)], targets, seed=5).total
        return result

    plain = torch.autograd.grad(total(embeddings, features), [embeddings, features])
    again = torch.autograd.grad(checkpoint(total, embeddings, features, use_reentrant=False), [embeddings, features])
    for each, other in zip(again, plain, strict=True):
        assert torch.equal(each, other)


@pytest.mark.parametrize("mixed", [False, True])
def test_one_graph(mixed: bool) -> None:
    embeddings = [leaf(BATCH, QUERIES, CHANNELS, dtype=torch.float32) for _ in range(2)]
    features, dense = (
        leaf(BATCH, CHANNELS, *LARGE, dtype=torch.float32),
        leaf(BATCH, QUERIES, *LARGE, dtype=torch.float32),
    )
    targets, logits, loss = entries(some_targets()), classes(2 + mixed), criterion()
    leaves = [*embeddings, features, *[dense] * mixed]

    def step(embeddings: list[Tensor], features: Tensor, seed: Tensor) -> Any:
        layers: list[Any] = [MaskFactors(each, features, 0.3) for each in embeddings]
        return loss(logits, [*layers, *[dense] * mixed], targets, seed=seed)

    expected = step(embeddings, features, torch.tensor(3))
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(embeddings, features, torch.tensor(3))
    assert torch.equal(out.matches.index, expected.matches.index)
    torch.testing.assert_close(out.total, expected.total)
    for each, other in zip(
        torch.autograd.grad(out.total, leaves), torch.autograd.grad(expected.total, leaves), strict=True
    ):
        torch.testing.assert_close(each, other)


# --- -------------------------------------------------------------------------------------- values, seeds, accumulation


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["embeddings", "features", "bias"])
def test_values_that_are_not_finite(value: float, where: str) -> None:
    """The loss shows it, and only that of the layer; nothing is raised."""
    layers = some_factors([LARGE, LARGE], shared=False)
    with torch.no_grad():
        part: Any = getattr(layers[0], where)
        part.fill_(value)
    out = criterion()(classes(2), layers, entries(some_targets()), seed=0)
    assert not out.total.isfinite()
    assert not out.loss_mask[0].isfinite()
    assert out.loss_mask[1].isfinite()
    grads = torch.autograd.grad(out.total, [layers[0].embeddings, layers[1].embeddings])
    assert not grads[0].isfinite().all()
    assert grads[1].isfinite().all()


def test_no_queries() -> None:
    factors, targets = some_factors([LARGE, (5, 7)], queries=0), entries(some_targets(counts=(1, 2)))
    out = criterion()(classes(2, queries=0), factors, targets)
    leaves = [part for each in factors for part in (each.embeddings, each.features, each.bias)]
    for leaf_, grad in zip(leaves, torch.autograd.grad(out.total, leaves), strict=True):
        assert grad.shape == leaf_.shape  # type: ignore[union-attr]
        assert not grad.any()


def test_an_instance_of_weight_zero_may_be_anything() -> None:
    targets = some_targets(counts=(2, 1))
    (factors,) = some_factors([LARGE], bias=False)
    with torch.no_grad():
        factors.embeddings[0, 1] = float("nan")
    pairs = [(torch.tensor([1, 3]), torch.tensor([0, 1])), (torch.tensor([2]), torch.tensor([0]))]
    out = MaskLoss(sampling=FEW, backend="cpu")(
        factors, targets, pairs, instance_weights=torch.tensor([0.0, 1.0, 1.0]), seed=0
    )
    assert out.total.isfinite()
    (grad,) = torch.autograd.grad(out.total, factors.embeddings)
    assert grad.isfinite().all()


def test_gradient_accumulation() -> None:
    parts, (factors,) = [some_targets(counts=(count,)) for count in (3, 2)], some_factors([LARGE])
    targets = MaskTargets.cat(parts)
    logits, labels = classes(1)[0], [torch.tensor([0, 1, 2]), torch.tensor([1, 0])]
    leaves = [logits, factors.embeddings, factors.features, factors.bias]
    whole = criterion()(logits, factors, {"masks": targets, "labels": labels}, image_ids=[4, 9], seed=2)
    wanted = torch.autograd.grad(whole.total, leaves)
    totals = step_totals([[3], [2]], QUERIES)
    sums = [torch.zeros_like(each) for each in leaves]
    for image, number in enumerate((4, 9)):
        one = slice(image, image + 1)
        part = MaskFactors(factors.embeddings[one], factors.features[one], factors.bias[one])  # type: ignore[index]
        mine = {"masks": parts[image], "labels": [labels[image]]}
        out = criterion()(logits[one], part, mine, totals=totals, image_ids=[number], seed=2)
        for total, grad in zip(sums, torch.autograd.grad(out.total, leaves), strict=True):
            total += grad
    for total, grad in zip(sums, wanted, strict=True):
        torch.testing.assert_close(total, grad, atol=1e-5, rtol=1e-5)


def test_threads_do_not_change_the_kernels() -> None:
    """The products are BLAS's; what the kernels make of the planes is the same for any number of threads."""
    from maskloss._abi import Draw, Gradients, Instances, Job, Term
    from maskloss.ops import cpu
    from support.batches import group

    targets = some_targets(counts=(3, 3))
    planes = torch.randn(6, *LARGE)
    number = torch.arange(6)
    index = torch.stack([number * 0, number // 3, number, number % 3], 1)
    job = Job(group(targets), Draw(torch.arange(2), torch.tensor(3), 60, 180, 45), Term())
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        instances = Instances([planes[None].expand(2, -1, -1, -1)], index, [6])
        ce, dice, saved = cpu.mask_loss(instances, job, keep=True)
        grads = torch.full_like(planes, float("nan"))
        written = Instances([grads[None].expand(2, -1, -1, -1)], index, [6])
        cpu.plane_gradients(Gradients(ce, dice), saved, written, job)
        results.append((ce, dice, *saved, grads))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# ------ --------------------------------------------------------------------------------------------- the object itself


def test_copies() -> None:
    factors = MaskFactors(torch.randn(1, 2, 3), torch.randn(1, 3, 4, 5), torch.randn(2), scratch_mb=5)
    for other in (pickle.loads(pickle.dumps(factors)), copy.deepcopy(factors)):
        assert torch.equal(other.dense(), factors.dense())
        assert other.scratch_mb == 5
        assert other.features is not factors.features


def test_facts() -> None:
    factors = MaskFactors(torch.randn(1, 2, 3, requires_grad=True), torch.randn(1, 3, 4, 5))
    assert factors.shape == (1, 2, 4, 5)
    assert factors.ndim == 4
    assert factors.requires_grad
    assert not factors.detach().requires_grad
    assert factors.dtype == torch.float32
    assert factors.device == torch.device("cpu")


def test_the_dict_of_rf_detr() -> None:
    given = {"spatial_features": torch.randn(1, 3, 4, 5), "query_features": torch.randn(1, 2, 3), "bias": torch.ones(1)}
    factors = MaskFactors.from_dict(given)
    wanted = torch.einsum("bqd,bdhw->bqhw", given["query_features"], given["spatial_features"]) + 1
    torch.testing.assert_close(factors.dense(), wanted)
    assert MaskFactors.from_dict({**given, "bias": None}).bias is None


E, F = torch.zeros(2, 5, 6), torch.zeros(2, 6, 9, 13)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: MaskFactors(E[0], F), r"MaskFactors: embeddings must be float \[B, Q, D\]"),
        (lambda: MaskFactors(E.int(), F), r"embeddings must be float"),
        (lambda: MaskFactors(E, F[0]), r"features must be float \[B, D, h, w\]"),
        (lambda: MaskFactors(E, None), r"features must be float"),  # type: ignore[arg-type]
        (lambda: MaskFactors(E[..., :3], F), r"must agree in B and D"),
        (lambda: MaskFactors(E[:1], F), r"must agree in B and D"),
        (lambda: MaskFactors(E, F[..., :0]), r"must have channels and pixels"),
        (lambda: MaskFactors(E, F.to("meta")), r"must be on one device"),
        (lambda: MaskFactors(E, F, torch.zeros(3)), r"bias must be a number or a float tensor"),
        (lambda: MaskFactors(E, F, torch.zeros(5).int()), r"bias must be a number or a float tensor"),
        (lambda: MaskFactors(E, F, "0"), r"bias must be a number or a float tensor"),  # type: ignore[arg-type]
        (lambda: MaskFactors(E, F, torch.zeros(5, device="meta")), r"bias must be on the device of the factors"),
        (lambda: MaskFactors(E, F, scratch_mb=0), r"scratch_mb must be a number above 0"),
        (lambda: MaskFactors(E, F, scratch_mb=float("inf")), r"scratch_mb must be a number above 0"),
        (lambda: MaskFactors.from_dict({"query_features": E}), r"MaskFactors.from_dict: .*spatial_features"),
        (lambda: MaskLoss()(MaskFactors(E, F), torch.zeros(2, 9, 9)), r"need matches"),
        (
            lambda: criterion()(torch.zeros(2, 5, 4), MaskFactors(E.double(), F), entries(some_targets())),
            r"embeddings and features must have one dtype",
        ),
        (
            lambda: criterion()(classes(2), [MaskFactors(E, F), torch.zeros(2, 4, 9, 13)], entries(some_targets())),
            r"must agree in batch size, queries, dtype and device",
        ),
    ],
)
def test_errors(make: Callable[[], object], text: str) -> None:
    with pytest.raises(MaskLossError, match=text):
        make()
