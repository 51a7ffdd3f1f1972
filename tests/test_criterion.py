"""The whole criterion: classification and mask loss over images and decoder layers, whatever it is given."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from maskloss import (
    ClipOptions,
    CriterionOutput,
    MaskCriterion,
    MaskLoss,
    MaskTargets,
    ops,
)
from support import oracle
from support.steps import CLASSES, FEW, QUERIES, SIZES, costs, criterion, entries, gradients, predictions

# --------------------------------------------------------------------------------------------------- it is the formulas


def drawn_points(out: CriterionOutput, masks: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
    """The points of the instances of each layer."""
    images = masks[0].shape[0]
    points = ops.uncertain_points(
        ops.Instances([layer.detach() for layer in masks], out.matches.index, out.matches.layer_sizes),
        ops.Draw(torch.arange(images), out.seed, FEW.num_points, FEW.num_candidates, FEW.num_uncertain),
        torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(images, 1),
        "zeros",
        backend,
    )
    return points.split(list(out.matches.layer_sizes))


def test_every_layer_is_the_formula(backend: str) -> None:
    """Given the matches: cross-entropy, BCE and Dice in float64 with torch's own functions, and their gradients."""
    targets, (classes, masks) = entries(), predictions()
    weights = {"class_weight": 1.5, "mask_weight": 4.0, "dice_weight": 3.0, "no_object_weight": 0.2}
    out = criterion(backend, **weights)(classes, masks, targets, seed=9)
    instances = 3 + 5
    assert out.matches.layer_sizes == (instances, instances)
    grads = gradients(out, classes, masks)
    for layer, points in enumerate(drawn_points(out, masks, backend)):
        wanted = torch.full((len(targets), QUERIES), CLASSES)
        pairs, rows = [], []
        for image, (queries, numbers) in enumerate(out.matches.pairs(layer)):
            wanted[image, queries] = targets[image]["labels"][numbers]
            pairs.append(targets[image]["masks"][numbers])
            rows.extend((image, int(query)) for query in queries)
        balance = torch.tensor([1.0] * CLASSES + [0.2], dtype=torch.float64)
        leaf = classes[layer].detach().double().requires_grad_()
        loss_class = cross_entropy(leaf.flatten(0, 1), wanted.flatten(), balance)
        (1.5 * loss_class).backward()
        planes = torch.stack([masks[layer][image, query] for image, query in rows]).detach()
        expected = oracle.instance_losses(planes, torch.cat(pairs), points, weights=(4.0 / instances, 3.0 / instances))
        assert_close(out.loss_class[layer].double(), loss_class.detach(), rtol=1e-5, atol=1e-6)
        assert_close(out.loss_mask[layer].double(), expected.ce.mean(), rtol=1e-5, atol=1e-6)
        assert_close(out.loss_dice[layer].double(), expected.dice.mean(), rtol=1e-5, atol=1e-6)
        assert_close(grads[layer].double(), leaf.grad, rtol=1e-4, atol=1e-6)
        dense = torch.zeros(masks[layer].shape, dtype=torch.float64)
        for (image, query), grad in zip(rows, expected.grad, strict=True):
            dense[image, query] += grad
        assert_close(grads[len(classes) + layer].double(), dense, rtol=1e-4, atol=1e-6)
    total = 1.5 * out.loss_class.sum() + 4.0 * out.loss_mask.sum() + 3.0 * out.loss_dice.sum()
    assert_close(out.total, total)


def test_a_layer_does_not_depend_on_the_others(backend: str) -> None:
    """Matches and classification of a layer are those of a call of its own; layers draw points of their own."""
    targets, (classes, masks) = entries(), predictions(sizes=[(9, 12)] * 3)
    for layers in (classes, masks):
        layers[2] = layers[0].detach().clone().requires_grad_()
    module = criterion(backend)
    together = module(classes, masks, targets, seed=4)
    for layer in range(3):
        alone = module(classes[layer], masks[layer], targets, seed=4)
        for left, right in zip(together.matches.pairs(layer), alone.matches.pairs(), strict=True):
            assert torch.equal(left[0], right[0])
            assert torch.equal(left[1], right[1])
        assert_close(together.loss_class[layer], alone.loss_class[0], rtol=1e-6, atol=0)
        same_points = torch.equal(together.loss_mask[layer], alone.loss_mask[0])
        assert same_points == (layer == 0)
    assert not torch.equal(together.loss_mask[2], together.loss_mask[0]), "equal layers draw different points"


def test_one_tensor_is_one_layer(backend: str) -> None:
    targets, (classes, masks) = entries(), predictions(sizes=SIZES[:1])
    single = criterion(backend)(classes[0], masks[0], targets, seed=4)
    listed = criterion(backend)(tuple(classes), tuple(masks), targets, seed=4)
    assert torch.equal(single.total, listed.total)
    assert single.loss_class.shape == (1,)


def test_mask_terms_are_those_of_the_mask_loss(backend: str) -> None:
    targets, (classes, masks) = entries(), predictions(sizes=SIZES[:1])
    out = criterion(backend)(classes, masks, targets, seed=4)
    loss = MaskLoss(sampling=FEW, backend=backend)
    for matches in (out.matches, out.matches.pairs()):
        alone = loss(masks[0], [entry["masks"] for entry in targets], matches, seed=4)
        assert torch.equal(alone.per_instance.ce, out.per_instance.ce)
        assert torch.equal(alone.per_instance.dice, out.per_instance.dice)
        assert_close(alone.ce, out.loss_mask[0])
        assert_close(alone.dice, out.loss_dice[0])


def test_names_of_the_terms() -> None:
    targets, (classes, masks) = entries(), predictions(sizes=[(4, 4)] * 3)
    out = criterion("reference")(classes, masks, targets, seed=0)
    terms = out.as_dict()
    assert list(terms) == [
        *("loss_class", "loss_mask", "loss_dice"),
        *("loss_class_0", "loss_mask_0", "loss_dice_0"),
        *("loss_class_1", "loss_mask_1", "loss_dice_1"),
    ]
    assert torch.equal(terms["loss_mask"], out.loss_mask[2])
    assert torch.equal(terms["loss_dice_1"], out.loss_dice[1])
    assert torch.equal(terms["loss_class_0"], out.loss_class[0])


# ------------------------------------------------------------------------------------------------ few targets, or many


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (9, 0), (6, 7), (5, 5)])
@pytest.mark.parametrize("form", ["masks", "map", "soft"])
def test_any_number_of_targets(backend: str, counts: tuple[int, ...], form: str) -> None:
    targets, (classes, masks) = entries(counts), predictions(images=2)
    for entry in targets:
        if form == "map":
            labels = torch.arange(20 * 26).view(20, 26) % 11
            entry |= {"masks": labels, "ids": torch.arange(len(entry["labels"]))}
        elif form == "soft":
            entry["masks"] = entry["masks"] * 0.5
    out = criterion(backend)(classes, masks, targets, seed=3)
    matched = sum(min(count, QUERIES) for count in counts)
    assert out.matches.layer_sizes == (matched, matched)
    assert len(out.per_instance.ce) == 2 * matched
    assert bool(torch.stack([out.total, *out.loss_mask, *out.loss_dice]).isfinite().all())
    grads = gradients(out, masks)
    for layer, grad in enumerate(grads):
        touched = grad.flatten(2).abs().sum(2) > 0
        expected = torch.zeros_like(touched)
        for image, (queries, _) in enumerate(out.matches.pairs(layer)):
            expected[image, queries] = True
        assert torch.equal(touched, expected), "matched queries have a gradient, the others an exact zero"


def test_a_batch_without_targets(backend: str) -> None:
    targets, (classes, masks) = entries((0, 0)), predictions(images=2)
    out = criterion(backend)(classes, masks, targets, seed=3)
    for term in (out.loss_mask, out.loss_dice):
        assert term.tolist() == [0.0, 0.0]
        assert term.requires_grad
    everywhere = torch.full((2 * QUERIES,), CLASSES)
    for layer in range(2):
        assert_close(out.loss_class[layer], cross_entropy(classes[layer].flatten(0, 1), everywhere))
    out.total.backward()
    for logits in masks:
        assert logits.grad is not None
        assert not bool(logits.grad.any())
    for logits in classes:
        assert logits.grad is not None
        assert bool(logits.grad.any())


def test_no_weight_at_all(backend: str) -> None:
    """No object, and "no object" weighs nothing: an exact zero, not 0 / 0."""
    targets, (classes, masks) = entries((0, 0)), predictions(images=2)
    out = criterion(backend, no_object_weight=0.0)(classes, masks, targets, seed=3)
    assert out.total.item() == 0
    assert all(not bool(grad.any()) for grad in gradients(out, classes, masks))


@pytest.mark.parametrize("no_object_weight", [0.0, 0.1, 1.0])
def test_weight_of_no_object(backend: str, no_object_weight: float) -> None:
    targets, (classes, masks) = entries(), predictions()
    out = criterion(backend, no_object_weight=no_object_weight)(classes, masks, targets, seed=3)
    [grad, _] = gradients(out, classes)
    unmatched = torch.ones(len(targets), QUERIES, dtype=torch.bool)
    for image, (queries, _) in enumerate(out.matches.pairs(0)):
        unmatched[image, queries] = False
    assert bool(grad[~unmatched].any(1).all())
    assert bool(grad[unmatched].any(1).all()) == (no_object_weight > 0)


# ------------------------------------------------------------------------------------------- dtypes and mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    """Half-precision logits are read as they are and summed in float32; float64 stays float64."""
    targets, (classes, masks) = entries(), predictions(dtype=dtype)
    plain = [[each.detach().float().requires_grad_() for each in layers] for layers in (classes, masks)]
    out, expected = (criterion(backend)(*logits, targets, seed=5) for logits in ((classes, masks), plain))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {out.total.dtype, out.loss_class.dtype, out.loss_mask.dtype, out.per_instance.dice.dtype} == {wide}
    assert torch.equal(out.matches.index, expected.matches.index)
    assert_close(out.total.float(), expected.total, rtol=1e-5, atol=1e-6)
    step = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-5
    for grad, wanted in zip(gradients(out, classes, masks), gradients(expected, *plain), strict=True):
        assert grad.dtype == dtype
        assert_close(grad.float(), wanted, rtol=2 * step, atol=1e-6)


def test_autocast_changes_nothing(backend: str) -> None:
    """The logits decide the precision of the loss and of the matching, not the region around the call."""
    targets, (classes, masks) = entries(), predictions(dtype=torch.bfloat16)
    module = criterion(backend)
    expected = module(classes, masks, targets, seed=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(classes, masks, targets, seed=5)
        found = costs(module.matcher, classes, masks, targets, 5)
        grads = gradients(out, classes, masks)
    assert torch.equal(found, costs(module.matcher, classes, masks, targets, 5))
    assert torch.equal(out.matches.index, expected.matches.index)
    assert out.total.dtype == torch.float32
    assert torch.equal(out.total, expected.total)
    for grad, wanted in zip(grads, gradients(expected, classes, masks), strict=True):
        assert torch.equal(grad, wanted)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classes, self.masks = nn.Linear(6, CLASSES + 1), nn.Linear(6, 8 * 8)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(features), self.masks(features).unflatten(-1, (8, 8))


def test_gradient_scaling_skips_a_broken_step(backend: str) -> None:
    targets, model, module = entries(), Heads(), criterion(backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    features = torch.randn(len(targets), QUERIES, 6)
    for broken in (False, True, False):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scale = scaler.get_scale()
        with torch.autocast("cpu", dtype=torch.float16):
            classes, masks = model(features * float("inf") if broken else features)
        assert masks.dtype == torch.float16
        total = module(classes, masks, targets, seed=0).total
        optimizer.zero_grad()
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
        assert moved == [not broken] * 4
        assert (scaler.get_scale() < scale) == broken


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_points_again(backend: str, reentrant: bool) -> None:
    """The seed comes from torch's generator, whose state is restored before the step is computed anew."""
    targets, model, module = entries(), Heads(), criterion(backend)
    features = torch.randn(len(targets), QUERIES, 6, requires_grad=True)

    def step(features: Tensor) -> Tensor:
        classes, masks = model(features)
        total: Tensor = module(classes, masks, targets).total
        return total

    found = []
    for run in (step, partial(checkpoint, step, use_reentrant=reentrant)):
        torch.manual_seed(3)
        total = run(features)
        model.zero_grad()
        total.backward()
        torch.rand(5)
        found.append([total.detach(), *(parameter.grad for parameter in model.parameters())])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of forward derivatives inside PyTorch
def test_forward_derivative_of_the_classification() -> None:
    targets, (classes, masks), module = entries(), predictions(), criterion("reference")
    masks = [layer.detach() for layer in masks]
    targets = [entry | {"masks": MaskTargets.from_masks(entry["masks"])} for entry in targets]
    directions = [torch.randn_like(layer) for layer in classes]

    def total(*classes: Tensor) -> Tensor:
        result: Tensor = module(list(classes), masks, targets, seed=4).total
        return result

    forward = torch.func.jvp(total, tuple(layer.detach() for layer in classes), tuple(directions))[1]
    backward = torch.autograd.grad(total(*classes), classes)
    along = torch.stack([(one * other).sum() for one, other in zip(backward, directions, strict=True)]).sum()
    assert_close(forward, along)


def test_training_lowers_the_loss(backend: str) -> None:
    """Logits of their own for every query learn a left and a right half, and their classes."""
    left = (torch.arange(24) < 12).expand(16, 24)
    targets = [{"masks": torch.stack([left, ~left]), "labels": torch.tensor([0, 2])}]
    [classes], [masks] = predictions(images=1, sizes=[(16, 24)])
    module, optimizer = criterion(backend), torch.optim.Adam([classes, masks], lr=1.0)
    losses = []
    for step in range(50):
        optimizer.zero_grad()
        out = module(classes, masks, targets, seed=step)
        out.total.backward()
        optimizer.step()
        losses.append(out.total.item())
    assert losses[-1] < 0.25 * losses[0]
    [(queries, numbers)] = out.matches.pairs()
    predicted = masks[0, queries].detach() > 0
    assert float((predicted == targets[0]["masks"][numbers]).float().mean()) > 0.95
    assert torch.equal(classes[0, queries].argmax(-1), targets[0]["labels"][numbers])


# -------------------------------------------------------------------------------------------------------------- targets


def collated(targets: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "masks": MaskTargets.from_masks([entry["masks"] for entry in targets]),
        "labels": [entry["labels"] for entry in targets],
    }


FORMS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "packed": lambda ts: [entry | {"masks": MaskTargets.from_masks(entry["masks"])} for entry in ts],
    "tuple of entries": tuple,
    "other keys": lambda ts: [entry | {"boxes": torch.zeros(0, 4), "image_id": 5} for entry in ts],
    "collated": collated,
    "collated labels": lambda ts: collated(ts) | {"labels": torch.cat([entry["labels"] for entry in ts])},
    "uint8 masks": lambda ts: [entry | {"masks": entry["masks"].byte()} for entry in ts],
    **{
        f"{dtype} labels": lambda ts, dtype=dtype: [entry | {"labels": entry["labels"].to(dtype)} for entry in ts]
        for dtype in (torch.int32, torch.int16, torch.uint8)
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_targets(backend: str, form: str) -> None:
    targets, (classes, masks) = entries(), predictions()
    module = criterion(backend)
    expected, out = module(classes, masks, targets, seed=2), module(classes, masks, FORMS[form](targets), seed=2)
    assert torch.equal(out.matches.index, expected.matches.index)
    assert torch.equal(out.total, expected.total)


# ------------------------------------------------------------------------------------------------ seeds, and the module


def test_seeds(backend: str) -> None:
    targets, (classes, masks) = entries(), predictions()
    module = criterion(backend)

    def total(**options: Any) -> Tensor:
        return module(classes, masks, targets, **options).total

    assert torch.equal(total(seed=1), total(seed=torch.tensor(1)))
    assert not torch.equal(total(seed=1), total(seed=2))
    assert torch.equal(total(seed=-1), total(seed=2**64 - 1)), "the same 64 bits"
    drawn = module(classes, masks, targets)
    assert torch.equal(total(seed=drawn.seed), drawn.total)
    assert torch.equal(*(total(generator=torch.Generator().manual_seed(7)) for _ in range(2)))
    torch.manual_seed(5)
    first, second = total(), total()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(total(), first)


def test_a_given_seed_leaves_the_generator_alone(backend: str) -> None:
    targets, (classes, masks) = entries(), predictions()
    state = torch.get_rng_state()
    criterion(backend)(classes, masks, targets, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_images_keep_their_points_in_any_order(backend: str) -> None:
    targets, (classes, masks) = entries((3, 4, 6)), predictions()
    module, order = criterion(backend), [2, 0, 1]
    expected = module(classes, masks, targets, seed=1, image_ids=[10, 11, 12])
    shuffled = module(
        [layer[order] for layer in classes],
        [layer[order] for layer in masks],
        [targets[image] for image in order],
        seed=1,
        image_ids=torch.tensor([12, 10, 11], dtype=torch.int32),
    )
    assert_close(shuffled.total, expected.total)
    other = module(classes, masks, targets, seed=1)
    assert not torch.equal(other.total, expected.total)


def test_the_module_keeps_nothing(backend: str) -> None:
    """No parameter and no buffer: a checkpoint does not hold the criterion, `half` does not round its weights."""
    targets, (classes, masks) = entries(), predictions()
    module = criterion(backend, no_object_weight=0.3)
    assert module.state_dict() == {}
    assert not list(module.parameters())
    expected = module(classes, masks, targets, seed=2).total
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        copy.deepcopy(module).half(),
        module.eval(),
    ):
        assert torch.equal(other(classes, masks, targets, seed=2).total, expected)
    text = repr(module)
    for shown in ("num_classes=3", "no_object_weight=0.3", "num_points=60", f"backend='{backend}'", "HungarianMatcher"):
        assert shown in text
    clips = ClipOptions(frames="present")
    text = repr(MaskCriterion(CLASSES, ignore_value=255, ignore_label=0, drop_empty=True, clips=clips))
    for shown in ("ignore_value=255", "ignore_label=0", "drop_empty=True", "frames='present'"):
        assert text.count(shown) == 2  # of the criterion or its loss, and of the matcher


@pytest.mark.parametrize("region", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend: str, region: Callable[[], Any]) -> None:
    targets, (classes, masks) = entries(), predictions()
    expected = criterion(backend)(classes, masks, targets, seed=2)
    with region():
        out = criterion(backend)(classes, masks, targets, seed=2)
    assert torch.equal(out.total, expected.total)
    assert not out.total.requires_grad


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_frozen_layers(backend: str, wanted: tuple[bool, bool]) -> None:
    """A layer that needs no gradient gets none, and the others theirs."""
    targets, (classes, masks) = entries(), predictions()
    expected = gradients(criterion(backend)(classes, masks, targets, seed=2), masks)
    for logits, wants in zip(masks, wanted, strict=True):
        logits.requires_grad_(wants)
    criterion(backend)(classes, masks, targets, seed=2).total.backward()
    for logits, wants, grad in zip(masks, wanted, expected, strict=True):
        if wants:
            assert torch.equal(logits.grad, grad)
        else:
            assert logits.grad is None


def test_the_environment_chooses_the_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, (classes, masks) = entries(), predictions()
    expected = criterion(backend)(classes, masks, targets, seed=2)
    monkeypatch.setenv("MASKLOSS_BACKEND", backend)
    assert torch.equal(MaskCriterion(CLASSES, sampling=FEW)(classes, masks, targets, seed=2).total, expected.total)
