"""The criteria with DETR's convention, against Transformers on the same points and against formulas."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskloss import MaskLossError, MaskTargets, StepTotals, distributed, step
from maskloss.factors import MaskFactors
from maskloss.integrations import _boxes, detr, maskdino
from support import tiny
from support.forced import answered, recorded

BASE = {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
WEIGHTS = {f"{name}{suffix}": weight for suffix in ("", "_0", "_1") for name, weight in BASE.items()}
POINTS = 64


def outputs_of(*, queries: int = 6, classes: int = tiny.CLASSES + 1, auxiliary: int = 2, boxes: bool = False) -> Any:
    generator = torch.Generator().manual_seed(3)

    def one() -> dict[str, Tensor]:
        layer = {
            "pred_logits": torch.randn(2, queries, classes, generator=generator),
            "pred_masks": torch.randn(2, queries, 16, 16, generator=generator) * 2,
        }
        if boxes:
            layer["pred_boxes"] = torch.rand(2, queries, 4, generator=generator) * 0.5 + 0.2
        return {name: value.requires_grad_() for name, value in layer.items()}

    return one() | {"aux_outputs": [one() for _ in range(auxiliary)]}


def targets_of(*, boxes: bool = False) -> list[dict[str, Any]]:
    masks = tiny.blobs()
    columns = zip(masks, tiny.labels_of(masks), tiny.boxes_of(masks), strict=True)
    return [{"masks": m, "labels": c} | ({"boxes": b} if boxes else {}) for m, c, b in columns]


def mask2former_criterion(cost_class: float = 2.0, **options: Any) -> detr.SetCriterion:
    matcher = detr.HungarianMatcher(cost_class, 5.0, 5.0, POINTS, backend=options.get("backend"))
    return detr.SetCriterion(tiny.CLASSES, matcher, WEIGHTS, 0.1, ["labels", "masks"], POINTS, 3.0, 0.75, **options)


def test_agrees_with_transformers_on_the_same_points(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    config = transformers.Mask2FormerConfig(num_labels=tiny.CLASSES, train_num_points=POINTS)
    outputs, targets = outputs_of(), targets_of()
    leaves = [outputs["pred_logits"], outputs["pred_masks"], *(v for a in outputs["aux_outputs"] for v in a.values())]
    criterion = modeling.Mask2FormerLoss(config, {})
    with recorded(monkeypatch) as recorder:
        losses = mask2former_criterion(criterion.matcher.cost_class, backend=backend)(outputs, targets)
    # maskloss has the final layer first here, as Transformers has.
    with answered(monkeypatch, recorder, final_first=False, shared=False):
        theirs = criterion(
            outputs["pred_masks"],
            outputs["pred_logits"],
            [t["masks"] for t in targets],
            [t["labels"] for t in targets],
            [
                {"masks_queries_logits": a["pred_masks"], "class_queries_logits": a["pred_logits"]}
                for a in outputs["aux_outputs"]
            ],
        )
    renamed = {name.replace("loss_cross_entropy", "loss_ce"): value for name, value in theirs.items()}
    assert losses.keys() == renamed.keys()
    for name, value in losses.items():
        torch.testing.assert_close(value, renamed[name], rtol=1e-5, atol=1e-7)
    ours = torch.autograd.grad(sum(losses.values()), leaves)
    for mine, other in zip(ours, torch.autograd.grad(sum(renamed.values()), leaves), strict=True):
        assert float((mine - other).norm()) <= 1e-5 * float(other.norm())


@pytest.mark.parametrize("kind", ["packed", "label map", "arrays", "lists"])
def test_takes_every_form_of_masks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of different sizes: all lie in the top left corner of the batch."""
    label_maps = [torch.randint(0, 4, (40, 40 - 8 * i), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    dense = [torch.stack([m == 1, m == 3]) for m in label_maps]
    labels = [torch.tensor([0, 2]), torch.tensor([1, 1])]
    forms: dict[str, list[dict[str, Any]]] = {
        "packed": [{"masks": MaskTargets.from_masks(m, canvas=(40, 40))} for m in dense],
        "arrays": [{"masks": m.numpy()} for m in dense],
        "lists": [{"masks": list(m)} for m in dense],
        "label map": [{"masks": m, "ids": [1, 3]} for m in label_maps],
        "dense": [{"masks": m.float()} for m in dense],
    }
    outputs = outputs_of()
    found = []
    for form in ("dense", kind):
        with recorded(monkeypatch):
            targets = [entry | {"labels": c} for entry, c in zip(forms[form], labels, strict=True)]
            found.append(mask2former_criterion()(outputs, targets))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=0)


def test_takes_the_code_bases_own_matcher() -> None:
    outputs, targets = outputs_of(), targets_of()
    seen = []

    def matcher(outputs: Any, targets: Any) -> Any:
        seen.append(sorted(outputs))
        return [(torch.arange(len(t["labels"])) + 1, torch.arange(len(t["labels"]))) for t in targets]

    criterion = detr.SetCriterion(tiny.CLASSES, matcher, WEIGHTS, 0.1, ["labels", "masks"], POINTS)
    losses = criterion(outputs, targets)
    assert seen[0] == ["pred_logits", "pred_masks"]
    assert list(losses) == [f"loss_{n}{s}" for s in ("", "_0", "_1") for n in ("ce", "mask", "dice")]
    wanted = torch.full((2, 6), tiny.CLASSES)
    for image, target in enumerate(targets):
        wanted[image, 1 : 1 + len(target["labels"])] = target["labels"]
    expected = F.cross_entropy(outputs["pred_logits"].transpose(1, 2), wanted, criterion.empty_weight)
    torch.testing.assert_close(losses["loss_ce"], expected)


def test_extra_costs_decide_the_matching() -> None:
    outputs, targets = outputs_of(auxiliary=0), targets_of()
    costs = []
    for target in targets:
        count = len(target["labels"])
        cost = torch.full((6, count), 1e4)
        cost[torch.arange(count) + 2, torch.arange(count).flip(0)] = 0
        costs.append(cost)
    pairs = detr.HungarianMatcher(num_points=POINTS)(outputs | {"extra_costs": costs}, targets)
    assert [q.tolist() for q, _ in pairs] == [[2, 3], [2, 3, 4]]
    assert [t.tolist() for _, t in pairs] == [[1, 0], [2, 1, 0]]


def test_boxes_are_part_of_cost_and_loss() -> None:
    outputs, targets = outputs_of(auxiliary=1, boxes=True), targets_of(boxes=True)
    for layer in (outputs, *outputs["aux_outputs"]):
        with torch.no_grad():
            for image, target in enumerate(targets):
                layer["pred_boxes"][image, 1 : 1 + len(target["boxes"])] = target["boxes"]
    matcher = detr.HungarianMatcher(0.1, 0.1, 0.1, POINTS, cost_box=100.0, cost_giou=100.0)
    pairs = matcher(outputs, targets)
    assert [(q - t).tolist() for q, t in pairs] == [[1, 1], [1, 1, 1]]
    losses = detr.SetCriterion(tiny.CLASSES, matcher, {}, 0.1, ["boxes"], POINTS)(outputs, targets)
    assert list(losses) == ["loss_bbox", "loss_giou", "loss_bbox_0", "loss_giou_0"]
    for value in losses.values():
        torch.testing.assert_close(value, torch.zeros(()), atol=1e-6, rtol=0)


def test_box_terms_equal_their_formulas() -> None:
    a, b = torch.rand(50, 4, dtype=torch.float64) * 0.5 + 0.1, torch.rand(50, 4, dtype=torch.float64) * 0.5 + 0.1
    terms = _boxes.box_terms(a, b)
    for one, other, l1, giou, iou in zip(a.tolist(), b.tolist(), *(t.tolist() for t in terms), strict=True):
        low = [max(p[i] - p[i + 2] / 2 for p in (one, other)) for i in (0, 1)]
        high = [min(p[i] + p[i + 2] / 2 for p in (one, other)) for i in (0, 1)]
        outer_low = [min(p[i] - p[i + 2] / 2 for p in (one, other)) for i in (0, 1)]
        outer_high = [max(p[i] + p[i + 2] / 2 for p in (one, other)) for i in (0, 1)]
        overlap = max(high[0] - low[0], 0) * max(high[1] - low[1], 0)
        union = one[2] * one[3] + other[2] * other[3] - overlap
        hull = (outer_high[0] - outer_low[0]) * (outer_high[1] - outer_low[1])
        assert l1 == pytest.approx(sum(abs(p - q) for p, q in zip(one, other, strict=True)))
        assert iou == pytest.approx(overlap / union)
        assert giou == pytest.approx(1 - (overlap / union - (hull - union) / hull))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_costs_of_boxes_are_those_of_their_terms(dtype: torch.dtype, tolerance: float) -> None:
    """Of images with 3, 20 and no targets, boxes without an area, and of negative and unknown size among them."""
    torch.manual_seed(0)
    boxes = torch.rand(2, 3, 17, 4, dtype=dtype) * 0.5 + 0.1
    boxes[0, 0, 0, 2:], boxes[0, 1, 1, 3], boxes[1, 0, 2, 2], boxes[1, 1, 3, 0] = 0, -0.2, torch.nan, torch.inf
    targets = [torch.rand(count, 4, dtype=dtype) * 0.5 + 0.1 for count in (3, 20, 0)]
    targets[1][7, 2:] = 0
    costs = _boxes.box_costs(boxes, targets, 5.0, 2.0)
    assert costs.shape == (2, 3, 17, 20)
    assert costs.dtype == dtype
    for image, given in enumerate(targets):
        terms = _boxes.box_terms(boxes[:, image, :, None].double(), given[None, None].double())
        expected = (5 * terms.l1 + 2 * (terms.giou - 1)).nan_to_num(torch.nan, torch.nan)
        found = costs[:, image, :, : len(given)].double().nan_to_num(torch.nan, torch.nan)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_sigmoid_classes_have_the_focal_loss() -> None:
    outputs, targets = outputs_of(classes=tiny.CLASSES, auxiliary=0), targets_of()
    matcher = detr.HungarianMatcher(num_points=POINTS, classification="focal")
    criterion = detr.SetCriterion(tiny.CLASSES, matcher, {}, 0.1, ["labels"], POINTS, classification="focal")
    with_fixed = detr.SetCriterion(tiny.CLASSES, lambda *_: pairs, {}, 0.1, ["labels"], POINTS, classification="focal")
    pairs = [(torch.arange(len(t["labels"])), torch.arange(len(t["labels"]))) for t in targets]
    hot = torch.zeros_like(outputs["pred_logits"])
    for image, target in enumerate(targets):
        hot[image, torch.arange(len(target["labels"])), target["labels"]] = 1
    p, logits = outputs["pred_logits"].sigmoid(), outputs["pred_logits"]
    right = torch.where(hot == 1, p, 1 - p)
    weight = torch.where(hot == 1, 0.25, 0.75)
    expected = (weight * (1 - right) ** 2 * F.binary_cross_entropy_with_logits(logits, hot, reduction="none")).sum() / 5
    torch.testing.assert_close(with_fixed(outputs, targets)["loss_ce"], expected)
    assert criterion(outputs, targets)["loss_ce"].isfinite()


def test_denoised_queries_have_the_targets_they_were_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, size = 2, 6
    outputs, targets = outputs_of(classes=tiny.CLASSES, boxes=True), targets_of(boxes=True)
    known = outputs_of(queries=size, classes=tiny.CLASSES, boxes=True)
    for layer in (known, *known["aux_outputs"]):
        with torch.no_grad():
            for image, target in enumerate(targets):
                for copy in range(copies):
                    first = copy * size // copies
                    layer["pred_boxes"][image, first : first + len(target["boxes"])] = target["boxes"]
                    layer["pred_logits"][image, first : first + len(target["boxes"])] = -50
                    rows = torch.arange(len(target["labels"]))
                    layer["pred_logits"][image, first + rows, target["labels"]] = 50
            layer["pred_logits"][0, 2::3] = -50
            layer["pred_masks"].zero_()
    matcher = maskdino.HungarianMatcher(2.0, 5.0, 5.0, POINTS, 5.0, 2.0)
    losses_of = ["labels", "masks", "boxes"]
    points = (POINTS, 3.0, 0.75)
    criterion = maskdino.SetCriterion(tiny.CLASSES, matcher, {}, 0.1, losses_of, *points, "seg", losses_of)
    counted: list[int] = []
    inner = distributed.mean_over_ranks
    monkeypatch.setattr(distributed, "mean_over_ranks", lambda *args: counted.append(1) or inner(*args))
    losses = criterion(outputs, targets, {"output_known_lbs_bboxes": known, "scalar": copies, "pad_size": size})
    names = [f"loss_{n}" for n in ("ce", "mask", "dice", "bbox", "giou")]
    assert set(losses) == {f"{n}{s}" for n in names for s in ("", "_0", "_1", "_dn", "_dn_1")}
    for suffix in ("_dn", "_dn_1"):
        for name in ("loss_bbox", "loss_giou", "loss_ce"):
            assert abs(losses[name + suffix].item()) < 1e-5
        assert losses["loss_mask" + suffix].item() == pytest.approx(0.6931, abs=1e-4)
    nothing = criterion(outputs, targets)
    assert nothing.keys() == losses.keys()
    assert nothing["loss_mask_dn_1"].item() == 0
    # Other ranks may have something to denoise in the same step.
    assert counted == [1, 1]
    # The first auxiliary layer has no denoising losses unless there are proposals, and so it need not be there.
    outputs["aux_outputs"], known["aux_outputs"] = outputs["aux_outputs"][:1], []
    losses = criterion(outputs, targets, {"output_known_lbs_bboxes": known, "scalar": copies, "pad_size": size})
    assert {name for name in losses if "_dn" in name} == {f"{name}_dn" for name in names}


def test_a_matcher_by_itself_takes_the_labels_that_its_criterion_takes() -> None:
    """The label "no object" too: other criteria call the matcher for each layer, and so do subclasses of it."""

    class Own(detr.HungarianMatcher):
        def forward(self, outputs: Any, targets: Any) -> Any:
            return super().forward(outputs, targets)

    outputs, targets = outputs_of(auxiliary=0), targets_of()
    targets[0]["labels"] = torch.full_like(targets[0]["labels"], tiny.CLASSES)
    found = []
    for kind in (detr.HungarianMatcher, Own):
        matcher = kind(2.0, 5.0, 5.0, POINTS)
        criterion = detr.SetCriterion(
            tiny.CLASSES, matcher, {}, 0.1, ["labels", "masks"], POINTS, no_object_label="allow"
        )
        with step(seed=3):
            found.append(criterion(outputs, targets))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value)
    targets[0]["labels"] += 1
    with pytest.raises(MaskLossError, match="labels must lie in"):
        matcher(outputs, targets)


def test_two_stages_and_panoptic_boxes() -> None:
    outputs, targets = outputs_of(classes=100, auxiliary=1, boxes=True), targets_of(boxes=True)
    outputs["interm_outputs"] = outputs_of(classes=100, auxiliary=0, boxes=True)
    del outputs["interm_outputs"]["aux_outputs"]
    targets[0]["labels"] = torch.tensor([90, 95])
    matcher = maskdino.HungarianMatcher(2.0, 5.0, 5.0, POINTS, 5.0, 2.0, panoptic_on=True)
    points = (POINTS, 3.0, 0.75)
    criterion = maskdino.SetCriterion(100, matcher, {}, 0.1, ["boxes"], *points, panoptic_on=True)
    losses = criterion(outputs, targets)
    assert set(losses) == {f"loss_{n}{s}" for n in ("bbox", "giou") for s in ("", "_0", "_interm")}
    targets[1]["labels"] = torch.tensor([80, 80, 80])
    assert criterion(outputs, targets)["loss_bbox"].item() == 0


def test_sam_3_style_focal_masks_at_points(backend: str) -> None:
    outputs, targets = outputs_of(auxiliary=0), targets_of()
    plain = mask2former_criterion(backend=backend)(outputs, targets)
    focal = mask2former_criterion(backend=backend, focal_alpha=0.25, focal_gamma=2.0)(outputs, targets)
    border = mask2former_criterion(backend=backend, padding_mode="border", target_mode="nearest")(outputs, targets)
    assert focal["loss_mask"].item() < 0.5 * plain["loss_mask"].item()
    assert border["loss_dice"].isfinite()


def test_weights_and_state_are_those_of_mask2former() -> None:
    criterion = mask2former_criterion()
    assert list(criterion.state_dict()) == ["empty_weight"]
    assert criterion.weight_dict == WEIGHTS
    losses = criterion(outputs_of(), targets_of())
    for name in losses:
        losses[name] *= 2.0
    sum(losses.values()).backward()  # type: ignore[union-attr]


def test_more_layers_are_supervised_or_rejected() -> None:
    outputs, targets = outputs_of(auxiliary=1), targets_of()
    proposals = outputs_of(auxiliary=0)
    criterion = mask2former_criterion()
    for held in (proposals, [proposals]):
        with pytest.raises(
            MaskLossError, match=r'"enc_outputs" holds one or more[\s\S]*layers_by_key\["enc_outputs"\]'
        ):
            criterion(outputs | {"enc_outputs": held}, targets)
    criterion.layers_by_key["enc_outputs"] = "_enc"
    criterion.weight_dict = WEIGHTS | {f"{name}_enc": 1.0 for name in BASE}
    found = criterion(outputs | {"enc_outputs": proposals, "queries": torch.zeros(2, 6)}, targets)
    assert list(found) == [f"{name}{suffix}" for suffix in ("", "_0", "_enc") for name in BASE]
    # None, and no auxiliary layers at all.
    for nothing in ({"aux_outputs": None, "interm_outputs": None, "enc_outputs": None}, {"aux_outputs": []}):
        assert list(criterion(outputs_of() | nothing, targets)) == list(BASE)


def test_losses_without_a_weight_are_told_once() -> None:
    outputs, targets = outputs_of(auxiliary=1), targets_of()
    criterion = mask2former_criterion()
    criterion.weight_dict = dict(BASE)
    with pytest.warns(UserWarning, match=r"no weight for loss_ce_0, loss_mask_0, loss_dice_0; training loops"):
        criterion(outputs, targets)
    criterion(outputs, targets)
    nothing = mask2former_criterion()
    nothing.weight_dict = {}
    nothing(outputs, targets)


class Contrastive(torch.nn.Module):
    """A loss of the final layer with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, outputs: Any, targets: Any, indices: Any, num_boxes: Any) -> dict[str, Tensor]:
        assert [len(queries) for queries, _ in indices] == [len(target["labels"]) for target in targets]
        return {"loss_contrastive": self.scale * outputs["texts"].square().mean() * num_boxes}


def test_an_extra_loss_is_one_of_the_final_layer() -> None:
    outputs, targets = outputs_of(auxiliary=1) | {"texts": torch.ones(2, 3)}, targets_of()
    criterion = mask2former_criterion(extra_loss=Contrastive())
    criterion.weight_dict = WEIGHTS | {"loss_contrastive": 0.5}
    found = criterion(outputs, targets)
    assert found["loss_contrastive"].item() == 5
    assert [name for name, _ in criterion.named_parameters()] == ["extra_loss.scale"]
    assert list(found)[-1] == "loss_contrastive"
    for wrong in (torch.zeros(()), {"loss_mask": torch.zeros(())}):
        with pytest.raises(MaskLossError, match="extra_loss must return other losses by name"):
            mask2former_criterion(extra_loss=lambda *_, wrong=wrong: wrong)(outputs, targets)
    criterion.losses = ["labels", "cards"]
    with pytest.raises(MaskLossError, match="losses must be a list of"):
        criterion(outputs, targets)


def test_errors_name_what_the_outputs_have() -> None:
    outputs = outputs_of(auxiliary=0)
    outputs["pred_masks"] = outputs["pred_masks"].detach().long()
    with pytest.raises(MaskLossError, match=r"^SetCriterion: pred_masks must be float16"):
        mask2former_criterion()(outputs, targets_of())


def denoise(mask_dict: Any) -> dict[str, Tensor]:
    matcher = detr.HungarianMatcher(num_points=POINTS, classification="focal")
    criterion = maskdino.SetCriterion(tiny.CLASSES + 1, matcher, {}, 0.1, [], POINTS, dn="seg")
    return criterion(outputs_of(), targets_of(), mask_dict)


ERRORS = {
    "extra_loss must be a function": lambda: mask2former_criterion(extra_loss=3),
    "losses must be a list of labels, masks, boxes": lambda: detr.SetCriterion(3, lambda *_: [], {}, 0.1, ["cards"]),
    "matcher and criterion must use the same classification": lambda: detr.SetCriterion(
        3, detr.HungarianMatcher(), {}, 0.1, ["labels"], classification="focal"
    ),
    "classification must be one of softmax, focal": lambda: detr.SetCriterion(
        3, lambda *_: [], {}, 0.1, [], classification="hinge"
    ),
    "cost_box must be": lambda: detr.HungarianMatcher(cost_box=-1.0),
    "dn must be one of no, standard, seg": lambda: maskdino.SetCriterion(3, lambda *_: [], {}, 0.1, [], dn="yes"),
    'outputs must have "pred_masks"': lambda: mask2former_criterion()(
        {"pred_logits": torch.zeros(2, 6, 4)}, targets_of()
    ),
    'pred_masks" must be a tensor': lambda: mask2former_criterion()(
        {"pred_logits": torch.zeros(2, 6, 4), "pred_masks": np.zeros((2, 6, 16, 16))}, targets_of()
    ),
    'dict with "masks" and "labels"': lambda: mask2former_criterion()(outputs_of(), [{}, {}]),
    "pred_logits must have 4 entries for 3 classes": lambda: mask2former_criterion()(
        outputs_of(classes=6), targets_of()
    ),
    'targets must have "boxes"': lambda: detr.HungarianMatcher(cost_box=1.0)(outputs_of(boxes=True), targets_of()),
    "all layers must have extra_costs": lambda: mask2former_criterion()(
        outputs_of() | {"extra_costs": [torch.zeros(6, 2), torch.zeros(6, 3)]}, targets_of()
    ),
    "extra_costs must be [Q, T]": lambda: detr.HungarianMatcher()(
        outputs_of() | {"extra_costs": [torch.zeros(6, 3), torch.zeros(6, 3)]}, targets_of()
    ),
    "pad_size must be a multiple of scalar": lambda: denoise(
        {"output_known_lbs_bboxes": outputs_of(), "scalar": 4, "pad_size": 6}
    ),
    "lacks scalar, pad_size": lambda: denoise({"output_known_lbs_bboxes": outputs_of()}),
    "lacks output_known_lbs_bboxes, scalar": lambda: denoise(["scalar"]),
    '"output_known_lbs_bboxes" must have every layer': lambda: denoise(
        {"output_known_lbs_bboxes": outputs_of(auxiliary=0), "scalar": 2, "pad_size": 6}
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_is_wrong(message: str) -> None:
    with pytest.raises(MaskLossError, match=re.escape(message)):
        ERRORS[message]()


def test_a_softmax_criterion_of_maskdino_with_its_focal_matcher() -> None:
    """The matcher counts one class more: queries without a target still get the criterion's "no object"."""
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, :8], masks[1, 8:] = True, True
    logits = torch.full((1, 5, 16, 16), -9.0)
    logits[0, 3], logits[0, 1] = 18.0 * masks[0] - 9, 18.0 * masks[1] - 9
    outputs = {"pred_logits": torch.randn(1, 5, 4), "pred_masks": logits}
    matcher = maskdino.HungarianMatcher(0.01, 5.0, 5.0, 64)
    criterion = maskdino.SetCriterion(3, matcher, {}, 0.1, ["labels", "masks"], 64, semantic_ce_loss=True)
    found = criterion(outputs, [{"labels": torch.tensor([0, 2]), "masks": masks}])
    weights, wanted = torch.tensor([1.0, 1.0, 1.0, 0.1]), torch.tensor([[3, 2, 3, 0, 3]])
    expected = torch.nn.functional.cross_entropy(outputs["pred_logits"].transpose(1, 2), wanted, weights)
    torch.testing.assert_close(found["loss_ce"], expected)


# ----------------------------------------------------------------------------------------------------- masks as factors


def factored(outputs: Any, form: str) -> tuple[Any, list[Tensor]]:
    """Outputs whose masks are factors of shared features, or RF-DETR's dict of three; and what gradients flow to."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(2, 5, 16, 16, generator=generator).requires_grad_()
    bias = torch.randn(1, generator=generator).requires_grad_()
    leaves = [features, bias]

    def one(layer: Any) -> Any:
        embeddings = torch.randn(2, layer["pred_logits"].shape[1], 5, generator=generator).requires_grad_()
        leaves.append(embeddings)
        factors = MaskFactors(embeddings, features, bias)
        parts = {"spatial_features": features, "query_features": embeddings, "bias": bias}
        forms: dict[str, Any] = {"factors": factors, "dict": parts, "dense": factors.dense()}
        return {"pred_logits": layer["pred_logits"].detach(), "pred_masks": forms[form]}

    return one(outputs) | {"aux_outputs": [one(layer) for layer in outputs["aux_outputs"]]}, leaves


@pytest.mark.parametrize("form", ["factors", "dict"])
@pytest.mark.parametrize("family", ["detr", "maskdino"])
def test_masks_may_be_factors(form: str, family: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family == "detr":
        criterion, plain = mask2former_criterion(backend=backend), outputs_of()
    else:
        matcher = maskdino.HungarianMatcher(2.0, 5.0, 5.0, POINTS, backend=backend)
        losses = ["labels", "masks"]
        criterion = maskdino.SetCriterion(tiny.CLASSES, matcher, WEIGHTS, 0.1, losses, POINTS, backend=backend)
        plain = outputs_of(classes=tiny.CLASSES)
    found = []
    for each in ("dense", form):
        outputs, leaves = factored(plain, each)
        with recorded(monkeypatch):
            losses_of = criterion(outputs, targets_of())
        found.append((losses_of, torch.autograd.grad(sum(losses_of.values()), leaves)))
    (dense, dense_gradients), (other, gradients) = found
    assert list(dense) == list(other)
    for name, value in dense.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7)
    for mine, theirs in zip(gradients, dense_gradients, strict=True):
        assert float((mine - theirs).norm()) <= 1e-4 * float(theirs.norm())


def test_wrong_factors_are_refused() -> None:
    outputs = outputs_of(auxiliary=0) | {"pred_masks": {"spatial_features": torch.zeros(2, 5, 16, 16)}}
    with pytest.raises(MaskLossError, match='must be a dict with "spatial_features" and "query_features"'):
        mask2former_criterion()(outputs, targets_of())


# ------------------------------------------------------------------------------------------- what drop-in code expects


def test_integer_masks_are_taken_if_they_are_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for dtype in (torch.float32, torch.int64, torch.int16):
        targets = [t | {"masks": t["masks"].to(dtype)} for t in targets_of()]
        with recorded(monkeypatch):
            found.append(mask2former_criterion()(outputs_of(), targets))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value)
        assert torch.equal(found[2][name], value)
    wrong = [t | {"masks": t["masks"].long() * 255} for t in targets_of()]
    with pytest.raises(MaskLossError, match=r"integer masks must be 0 or 1[\s\S]*values reach from 0 to 255"):
        mask2former_criterion()(outputs_of(), wrong)


def test_a_target_without_a_class_is_matched_by_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its label is that of "no object"; the original criterion trains its mask, and so its query to be no object."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    outputs, targets = outputs_of(auxiliary=0), targets_of()
    targets[1]["labels"][1] = tiny.CLASSES
    with recorded(monkeypatch) as recorder, pytest.warns(UserWarning, match="subtract 1"):
        losses = mask2former_criterion()(outputs, targets)
    config = transformers.Mask2FormerConfig(num_labels=tiny.CLASSES, train_num_points=POINTS)
    with answered(monkeypatch, recorder, final_first=False, shared=False):
        theirs = modeling.Mask2FormerLoss(config, {})(
            outputs["pred_masks"],
            outputs["pred_logits"],
            [t["masks"] for t in targets],
            [t["labels"] for t in targets],
        )
    for name, value in theirs.items():
        torch.testing.assert_close(losses[name.replace("cross_entropy", "ce")], value, rtol=1e-5, atol=1e-7)
    targets[1]["labels"][1] = tiny.CLASSES + 1
    with pytest.raises(MaskLossError, match=r"labels must lie in \[0, 4\)"):
        mask2former_criterion()(outputs, targets)
    targets[1]["labels"][1] = tiny.CLASSES
    sigmoids = detr.HungarianMatcher(num_points=POINTS, classification="focal")
    with pytest.raises(MaskLossError, match=r"labels must lie in \[0, 3\)"):
        sigmoids(outputs_of(classes=tiny.CLASSES), targets)


def test_totals_must_know_classes_where_some_are_unknown() -> None:
    outputs, module = outputs_of(), mask2former_criterion(ignore_label=255)
    with step(totals=StepTotals(4.0, 12.0)), pytest.raises(MaskLossError, match="class_weight belongs to ignore_label"):
        module(outputs, targets_of())
    with step(totals=StepTotals(4.0, 12.0, class_weight=4.0), seed=0):
        assert torch.isfinite(module(outputs, targets_of())["loss_ce"])


def test_options_are_there_under_their_names() -> None:
    criterion = mask2former_criterion()
    assert (criterion.num_points, criterion.oversample_ratio, criterion.importance_sample_ratio) == (POINTS, 3.0, 0.75)
    matcher = criterion.matcher
    assert (matcher.cost_class, matcher.cost_mask, matcher.cost_dice, matcher.num_points) == (2.0, 5.0, 5.0, POINTS)
    # What is read only cannot be set without effect.
    with pytest.raises(AttributeError):
        criterion.num_points = 3
    with pytest.raises(AttributeError):
        matcher.cost_mask = 3.0


def test_the_original_criterion_can_print_our_matcher() -> None:
    matcher = maskdino.HungarianMatcher(2.0, 5.0, 5.0, POINTS, 5.0, 2.0)
    lines = matcher.__repr__(_repr_indent=8).split("\n")
    assert lines[0] == "HungarianMatcher:"
    assert lines[1:3] == [" " * 8 + "cost_class: 2.0", " " * 8 + "cost_mask: 5.0"]
    assert "cost_giou: 2.0" in repr(matcher)
    text = repr(mask2former_criterion(dice="soft", ignore_label=-1))
    for shown in ("cost_dice: 5.0", "num_classes=3", "dice='soft'", "ignore_label=-1", "no_object_label='warn'"):
        assert shown in text


@pytest.mark.parametrize("base", [detr.SetCriterion, maskdino.SetCriterion])
@pytest.mark.parametrize("name", ["loss_labels", "loss_masks", "get_loss", "_get_src_permutation_idx"])
def test_a_subclass_whose_methods_would_not_be_called_is_refused(base: type, name: str) -> None:
    with pytest.raises(MaskLossError, match=f"Fork has {name}, but all layers are computed together"):
        type("Fork", (base,), {name: lambda self, *_: {}})

    class Mixin:
        pass

    setattr(Mixin, name, lambda self, *_: {})
    with pytest.raises(MaskLossError, match="must not override what is not called"):
        type("Fork", (Mixin, base), {})
    criterion = base(3, len, {}, 0.1, ["labels"])
    with pytest.raises(MaskLossError, match=f"SetCriterion has {name}, but all layers"):
        setattr(criterion, name, len)


def test_a_subclass_of_the_matcher_is_honored_or_refused() -> None:
    with pytest.raises(MaskLossError, match="Fork has memory_efficient_forward"):
        type("Fork", (detr.HungarianMatcher,), {"memory_efficient_forward": lambda self, *_: []})

    class Fixed(detr.HungarianMatcher):
        def forward(self, outputs: Any, targets: Any) -> Any:
            return [(torch.arange(len(t["labels"])) + 1, torch.arange(len(t["labels"]))) for t in targets]

    criterion = detr.SetCriterion(tiny.CLASSES, Fixed(num_points=POINTS), WEIGHTS, 0.1, ["labels"], POINTS)
    outputs, targets = outputs_of(), targets_of()
    wanted = torch.full((2, 6), tiny.CLASSES)
    for image, target in enumerate(targets):
        wanted[image, 1 : 1 + len(target["labels"])] = target["labels"]
    expected = F.cross_entropy(outputs["pred_logits"].transpose(1, 2), wanted, criterion.empty_weight)
    torch.testing.assert_close(criterion(outputs, targets)["loss_ce"], expected)
