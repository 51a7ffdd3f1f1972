"""Models of Transformers: loaded from a folder, their heads resized, their own normalization, exact totals."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import torch

from maskloss import MaskLossError, methods
from maskloss.distributed import StepTotals, step_totals
from maskloss.lab.cli import main
from maskloss.lab.commands.methods import settings_of_run
from maskloss.lab.config import TrainConfig
from maskloss.lab.loop.progress import Listener
from maskloss.lab.loop.run import resume, train
from maskloss.lab.models.cards import Card, read_card
from maskloss.lab.models.families import FAMILIES, backbone_shares
from maskloss.lab.models.learners import CompactLearner
from maskloss.lab.models.pretrained import PretrainedLearner
from maskloss.lab.models.registry import open_source
from maskloss.lab.models.weights import read_tensors
from maskloss.lab.results.predict import predict_images
from maskloss.lab.results.scoring import evaluate_run
from maskloss.lab.runfolder import path_of
from support import tiny

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("no_pictures"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

PROCESSOR = {
    "image_processor_type": "Mask2FormerImageProcessor",
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.5, 0.6, 0.7],
    "size": {"height": 64, "width": 64},
}


@pytest.fixture(params=["mask2former", "eomt"])
def model_folder(request, tmp_path):
    return write_model(request.param, tmp_path / "model")


def write_model(family, path):
    torch.manual_seed(0)
    # Of another number of classes than the data.
    getattr(tiny, family)().save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    if family == "oneformer":
        # A tokenizer of single letters.
        letters = sorted(set("the task is instance") - {" "})
        words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        vocabulary = {word: number for number, word in enumerate(words)}
        transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(path)
    return path


def config_of(model, data, **options):
    given = {"steps": 3, "batch_size": 4, "evaluations": 1, "workers": 0, "threads": 2, "device": "cpu", "lr": 1e-4}
    return TrainConfig(model=str(model), data=str(data), **(given | options))


def learner_of(model_folder, classes=("a", "b")):
    return PretrainedLearner(TrainConfig(num_points=32, lr=1e-4), read_card(str(model_folder)), classes)


def test_a_run(model_folder, folder, tmp_path):
    finished = train(config_of(model_folder, folder.root), tmp_path / "run", Listener.silent())
    # What a run leaves is a folder of Transformers, with the classes of the data.
    loaded = transformers.AutoModelForUniversalSegmentation.from_pretrained(tmp_path / "run" / "model")
    assert loaded.config.id2label == {0: "box", 1: "disc"} and loaded.class_predictor.out_features == 3
    assert type(loaded.criterion).__module__.startswith("transformers")
    assert json.loads((tmp_path / "run" / "model" / "preprocessor_config.json").read_text()) == PROCESSOR
    # And all that is needed: the model that it began with may go.
    model_folder.rename(tmp_path / "gone")
    scores, _, _ = evaluate_run(tmp_path / "run", device="cpu")
    assert scores.as_dict() == finished.evaluation.as_dict()
    written, _ = predict_images(
        tmp_path / "run", [folder.root / "images" / "0.png"], tmp_path / "out", device="cpu", threshold=0
    )
    assert all(path.is_file() for path in written)
    # COCO results have the category ids of the data.
    assert {entry["category_id"] for entry in json.loads((tmp_path / "out" / "predictions.json").read_text())} <= {3, 7}


def test_the_paragraphs_of_a_run(folder, tmp_path):
    torch.manual_seed(0)
    tiny.mask2former().save_pretrained(tmp_path / "model")
    config = config_of(tmp_path / "model", folder.root, steps=2, layout="stratified", crop=48, num_points=40)
    train(config, tmp_path / "run", Listener.silent())
    settings = settings_of_run(tmp_path / "run")
    # The layout is the run's: a configuration of Transformers knows none.
    assert settings.points.layout == settings.matching.points.layout == "stratified"
    assert settings.points.count == settings.matching.points.count == 40
    text = " ".join(methods.describe(settings).split())
    for part in (
        "We train Mask2Former (", "), initialized from model, on inputs of 512 × 512 pixels for 2 steps with a batch ",
        "a peak learning rate of 0.0001 (0.1 times that for the backbone)", "random square crops of 29 to 62 pixels",
        "Uniform draws are stratified", "Points are drawn inside the image only", "w_np, which is 0 in ignored regions",
    ):  # fmt: skip
        assert part in text, part


def test_weights_are_loaded_and_the_head_is_new(model_folder):
    original = transformers.AutoModelForUniversalSegmentation.from_pretrained(model_folder)
    learner = learner_of(model_folder, ["only"])
    state, before = learner.network.state_dict(), original.state_dict()
    changed = {name for name in state if name not in before or state[name].shape != before[name].shape}
    assert changed == {"class_predictor.weight", "class_predictor.bias", "criterion.empty_weight"}
    for name in set(state) - changed:
        assert torch.equal(state[name], before[name]), name
    no_object = original.config.no_object_weight
    torch.testing.assert_close(learner.network.criterion.empty_weight, torch.tensor([1.0, no_object]))
    assert type(learner.network.criterion).__name__.startswith("PointSampled")


def test_the_processors_normalization_is_respected(model_folder):
    learner = learner_of(model_folder)
    pixels = learner.inputs(torch.full((1, 3, 64, 64), 0.4), torch.tensor([[0.0, 0.0, 1.0, 0.5]]))
    expected = (0.4 - torch.tensor(PROCESSOR["image_mean"])) / torch.tensor(PROCESSOR["image_std"])
    torch.testing.assert_close(pixels["pixel_values"][0, :, 5, 5], expected)
    if "pixel_mask" in pixels:
        assert pixels["pixel_mask"][0, :32].all() and not pixels["pixel_mask"][0, 32:].any()


@pytest.mark.parametrize(
    ("changes", "value"),
    [({"do_normalize": False}, 0.4), ({"do_normalize": False, "do_rescale": False}, 102.0), (None, -0.37)],
)
def test_other_processors(model_folder, changes, value):
    path = model_folder / "preprocessor_config.json"
    if changes is None:
        path.unlink()  # ImageNet's
    else:
        path.write_text(json.dumps(PROCESSOR | changes))
    pixels = learner_of(model_folder).inputs(torch.full((1, 3, 64, 64), 0.4), torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    assert float(pixels["pixel_values"][0, 0, 0, 0]) == pytest.approx(value, abs=0.01)


def test_micro_batches_add_up_to_the_whole_batch(model_folder, folder):
    """The losses of two halves, each with the totals of the whole, are those of the whole: terms and gradients."""
    source = open_source(config_of(model_folder, folder.root), 64)
    whole = source.batch(0, range(4), 4, 0)
    halves = [source.batch(0, range(2), 4, 0), source.batch(0, range(2, 4), 4, 0)]
    learner = learner_of(model_folder, source.class_names).eval()
    totals = step_totals([whole.masks.num_targets], learner.num_queries)
    assert isinstance(totals, StepTotals)

    def gradients(batches):
        learner.zero_grad()
        losses = [learner(batch, totals, 7) for batch in batches]
        sum(each.total for each in losses).backward()
        terms = {name: sum(each.terms[name] for each in losses) for name in losses[0].terms}
        return terms, {name: each.grad for name, each in learner.named_parameters() if each.grad is not None}

    terms, grads = gradients([whole])
    summed, added = gradients(halves)
    assert {"loss_class", "loss_mask", "loss_dice"} <= set(terms)
    for name, value in terms.items():
        torch.testing.assert_close(summed[name], value, rtol=1e-4, atol=1e-5)
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(added[name], grad, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_class_weights_of_micro_batches(model_folder, folder):
    """The classification is divided by the weights of the whole step's queries, whatever the classes of a part."""
    source = open_source(config_of(model_folder, folder.root), 64)
    batch = source.batch(0, range(4), 4, 0)
    weights = [3.0, 0.5]
    learner = PretrainedLearner(TrainConfig(num_points=32), read_card(str(model_folder)), ["a", "b"], weights).eval()
    labels = list(batch.labels.split(list(batch.masks.num_targets)))
    totals = step_totals([batch.masks.num_targets], learner.num_queries, labels=[labels], class_weights=weights)
    loss = learner(batch, totals, 7).terms["loss_class"]
    output = learner.predict(batch.images, batch.masks.windows)
    # Matched queries are those with another class than the last in the criterion's own targets.
    criterion = learner.mask_criterion()
    out = criterion(
        output.class_logits, output.mask_logits, batch.targets, totals=totals, image_ids=batch.image_ids, seed=7
    )
    torch.testing.assert_close(loss, out.loss_class[0].detach(), rtol=0.1, atol=0.02)
    plain = learner_of(model_folder).eval()
    plain.network.load_state_dict(
        learner.network.state_dict() | {"criterion.empty_weight": plain.network.criterion.empty_weight}
    )
    counts = step_totals([batch.masks.num_targets], learner.num_queries)
    assert abs(float(plain(batch, counts, 7).terms["loss_class"] - loss)) > 0.02


def test_a_run_begins_with_the_weights_of_another(model_folder, folder, tmp_path):
    train(config_of(model_folder, folder.root), tmp_path / "first", Listener.silent())
    model_folder.rename(tmp_path / "gone")
    told = []
    folder.content["categories"] = [{"id": 7, "name": "coin"}, {"id": 3, "name": "card"}]
    folder.save()
    config = config_of(tmp_path / "first", folder.root, lr=1e-30, weight_decay=0.0)
    train(config, tmp_path / "second", Listener.silent()._replace(facts=told.append))
    assert dict(told[0])["begins from"].endswith("with a new classification: its classes are 2: box, disc")
    first, second = (read_tensors(tmp_path / name / "model" / "model.safetensors") for name in ("first", "second"))
    # The rate moves none of them so far.
    other = {name for name, tensor in second.items() if not torch.allclose(tensor, first[name], atol=1e-20, rtol=0)}
    assert other == {"class_predictor.weight", "class_predictor.bias"}


def test_the_terms_are_those_of_the_criterion(model_folder, folder):
    """The learner's losses are what MaskCriterion gives for the same logits, points and targets."""
    source = open_source(config_of(model_folder, folder.root), 64)
    batch = source.batch(0, range(3), 3, 0)
    learner = learner_of(model_folder, source.class_names).eval()
    totals = step_totals([batch.masks.num_targets], learner.num_queries)
    terms = learner(batch, totals, 7).terms
    output = learner.predict(batch.images, batch.masks.windows)
    config = TrainConfig(num_points=32, grid=2, no_object_weight=float(learner.network.config.no_object_weight))
    criterion = CompactLearner(config, 2, 3).criterion
    out = criterion(
        output.class_logits, output.mask_logits, batch.targets, totals=totals, image_ids=batch.image_ids, seed=7
    )
    for name in ("loss_class", "loss_mask", "loss_dice"):
        # Points of this layer are numbered after the others', so the terms agree within the noise of the points.
        torch.testing.assert_close(terms[name], getattr(out, name)[0].detach(), rtol=0.15, atol=0.05)


# ------------------------------------------------------------------------------------------------ RF-DETR, OneFormer

OTHERS = {
    "rf_detr": ("class_embed.weight", "enc_out_class_embed.0.weight"),
    "oneformer": ("decoder.class_embed.weight",),
}
each_other = pytest.mark.parametrize("family", ["rf_detr", pytest.param("oneformer", marks=pytest.mark.slow)])


@each_other
def test_a_run_of_another_family(family, folder, tmp_path):
    path = write_model(family, tmp_path / "model")
    config = config_of(path, folder.root, num_points=24, checkpoint_every=2)
    finished = train(config, tmp_path / "run", Listener.silent())
    # What it leaves is a folder of Transformers, and all that is needed.
    kind = {"rf_detr": transformers.RfDetrForInstanceSegmentation}.get(
        family, transformers.AutoModelForUniversalSegmentation
    )
    loaded = kind.from_pretrained(tmp_path / "run" / "model")
    assert loaded.config.id2label == {0: "box", 1: "disc"}
    state = loaded.state_dict()
    for ending in OTHERS[family]:
        [found] = {len(tensor) for name, tensor in state.items() if name.endswith(ending)}
        assert found == 2 + (family == "oneformer")
    path.rename(tmp_path / "gone")
    assert evaluate_run(tmp_path / "run", device="cpu")[0] == finished.evaluation
    # Interrupted, it reaches the same weights.
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(path_of(tmp_path / "again", 3))
    (tmp_path / "again" / "summary.json").unlink()
    resume(tmp_path / "again", Listener.silent())
    ours, theirs = (read_tensors(tmp_path / name / "model" / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # It can be looked at, and described.
    assert main(["show", str(tmp_path / "run"), "--out", str(tmp_path / "show.png")]) == 0
    text = " ".join(methods.describe(settings_of_run(tmp_path / "run")).split())
    assert "contrastive" not in text and "(0.1 times that for the backbone)" in text and " 24 points" in text


@each_other
def test_another_family_learns(family, folder, tmp_path):
    """Masks, labels, boxes and images belong together: the loss of a batch falls."""
    path = write_model(family, tmp_path / "model")
    config = config_of(path, folder.root, num_points=64, lr=3e-3, augment=False)
    source = open_source(config, 64)
    batch = source.batch(0, range(4), 4, 0)
    card = read_card(str(path))
    learner = card.build(card.resolve(config, source, 1), source.class_names, 3, trained=True).train()
    optimizer = torch.optim.AdamW(learner.network.parameters(), lr=3e-3)
    totals = step_totals([batch.masks.num_targets], learner.num_queries)
    losses = []
    for number in range(30):
        optimizer.zero_grad()
        found = learner(batch, totals, number)
        found.total.backward()
        optimizer.step()
        losses.append(float(found.total.detach()))
    assert {"loss_class", "loss_mask", "loss_dice"} <= set(found.terms)
    assert losses[-1] < 0.8 * losses[0], losses


def test_boxes_are_those_of_the_masks(folder, cells):
    for data in (folder.root, cells):
        batch = open_source(TrainConfig(data=str(data)), 64).batch(0, range(3), 3, 0)
        masks = [mask for image in range(3) for mask in batch.masks[image].dense()]
        boxes = torch.cat(batch.boxes())
        assert len(masks) == len(boxes) > 3
        for mask, box in zip(masks, boxes, strict=True):
            y, x = mask.nonzero(as_tuple=True)
            low, high = torch.stack([x.min(), y.min()]), torch.stack([x.max(), y.max()]) + 1
            sides = torch.tensor([mask.shape[1], mask.shape[0]])
            torch.testing.assert_close(box, torch.cat([(low + high) / 2 / sides, (high - low) / sides]))


def test_what_oneformer_is_asked(tmp_path):
    """The task as its processor writes it: numbers of tokens, and zeros."""
    card = read_card(str(write_model("oneformer", tmp_path)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert card.config.task_tokens == [*tokenizer("the task is instance")["input_ids"][:4], tokenizer.eos_token_id]
    learner = PretrainedLearner(TrainConfig(num_points=32), card, ["a"])
    tokens = learner.inputs(torch.zeros(2, 3, 64, 64), torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2))["task_inputs"]
    assert tokens.tolist() == [card.config.task_tokens] * 2


def test_what_rf_detr_does_not_take(folder, tmp_path):
    path = write_model("rf_detr", tmp_path / "model")
    for options, message in (
        ({"balance": True}, "--balance is for a softmax"),
        ({"no_object_weight": 0.2}, "--no-object-weight is for a softmax"),
        ({"size": 56}, "--size must be a multiple of 16 for this model"),
    ):
        with pytest.raises(MaskLossError, match=message):
            train(config_of(path, folder.root, **options), tmp_path / "run", Listener.silent())


# ---------------------------------------------------------------------------------------------------------- backbones


def test_a_frozen_backbone_stays_as_it_is(tmp_path, folder):
    path = write_model("mask2former", tmp_path / "model")
    train(config_of(path, folder.root, freeze_backbone=True, lr=1e-2), tmp_path / "run", Listener.silent())
    before = transformers.AutoModelForUniversalSegmentation.from_pretrained(path).state_dict()
    after = read_tensors(tmp_path / "run" / "model" / "model.safetensors")
    same = {name for name in before if name in after and torch.equal(before[name], after[name])}
    backbone = {name for name in before if name.startswith(FAMILIES["mask2former"].backbone)}
    moved = {name for name in before if "transformer_module" in name and "weight" in name and before[name].ndim > 1}
    assert backbone <= same and not moved & same
    learner = PretrainedLearner(TrainConfig(num_points=32, freeze_backbone=True), read_card(str(path)), ["a"]).train()
    assert not learner.network.model.pixel_level_module.encoder.training and learner.network.class_predictor.training


@pytest.mark.parametrize("family", FAMILIES)
def test_rates_fall_from_block_to_block(family, tmp_path):
    network = getattr(tiny, family)()
    names = [name for name, _ in network.named_parameters()]
    shares = backbone_shares(names, FAMILIES[family], 0.5, 0.1)
    inside = [name for name in names if name.startswith(FAMILIES[family].backbone)]
    assert {shares[name] for name in names if name not in inside} == {1.0}
    blocks = {"eomt": 3, "eomt_dinov3": 3, "rf_detr": 2}.get(family, 4)
    assert sorted({round(shares[name], 9) for name in inside}) == [
        round(0.5 * 0.1**depth, 9) for depth in range(blocks, -1, -1)
    ]
    first = next(name for name in inside if "patch_embed" in name)
    last = next(name for name in reversed(inside) if re.search(rf"layers?\.{blocks - 1}\.", name))
    assert shares[first] == pytest.approx(0.5 * 0.1**blocks) and shares[last] == 0.5


def test_options_of_backbones(tmp_path, folder):
    path = write_model("mask2former", tmp_path / "model")
    config = TrainConfig(num_points=32, lr=1e-3, backbone_lr=5e-4, layer_decay=0.5)
    groups = PretrainedLearner(config, read_card(str(path)), ["a"]).groups(config)
    assert {round(group["share"], 6) for group in groups} == {1.0, *(0.5 * 0.5**depth for depth in range(5))}
    with pytest.raises(MaskLossError, match="--layer-decay is for a backbone that is trained"):
        TrainConfig(freeze_backbone=True, layer_decay=0.5)
    with pytest.raises(MaskLossError, match="--freeze-backbone is for a pretrained model"):
        train(TrainConfig(data=str(folder.root), freeze_backbone=True), tmp_path / "run", Listener.silent())


def test_the_backbone_is_moved_less(tmp_path):
    tiny.mask2former().save_pretrained(tmp_path)
    groups = learner_of(tmp_path).groups(TrainConfig())
    assert sorted({group.get("share", 1.0) for group in groups}) == [0.1, 1.0]
    assert sum(len(group["params"]) for group in groups) == len(list(learner_of(tmp_path).network.parameters()))


def test_what_cannot_be_trained(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for name, message in (
        ("empty", r"has no config\.json"),
        ("bert", "cannot be trained here: it is a bert"),
        ("broken", "--model must be"),
    ):
        with pytest.raises(MaskLossError, match=message):
            train(config_of(tmp_path / name, folder.root), tmp_path / "run", Listener.silent())
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_nowhere(monkeypatch, tmp_path, folder):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MaskLossError, match=r"--model must be compact[\s\S]*nobody/nothing"):
        train(config_of("nobody/nothing", folder.root), tmp_path / "run", Listener.silent())


def test_options_that_do_not_go_together(model_folder, folder, tmp_path):
    for options, message in (
        ({"grid": 4}, "--grid is for the compact model"),
        ({"norm": "group"}, "--norm is for the compact model"),
        ({"size": 80}, "of 32 for this model|takes images of one size"),
    ):
        with pytest.raises(MaskLossError, match=message):
            train(config_of(model_folder, folder.root, **options), tmp_path / "run", Listener.silent())


def test_more_instances_than_queries(model_folder, folder, tmp_path):
    box = folder.content["annotations"][1]
    folder.content["annotations"] += [{**box, "id": 100 + number} for number in range(9)]
    folder.save()
    told = []
    train(config_of(model_folder, folder.root), tmp_path / "run", Listener.silent()._replace(facts=told.append))
    # Eleven instances of an image.
    assert "instances beyond the 6 that the model can find in an image" in dict(told[0])["suspicious"]
    assert ": 5 (0.png" in dict(told[0])["suspicious"]


def test_an_interrupted_run_goes_on(tmp_path, folder, monkeypatch):
    from maskloss.lab.loop import engine

    model = tiny.mask2former()
    model.config.backbone_config.drop_path_rate = 0.3  # drawn from torch's own generator
    model.save_pretrained(tmp_path / "model")
    config = config_of(tmp_path / "model", folder.root, steps=4, checkpoint_every=2, size=64)
    train(config, tmp_path / "whole", Listener.silent())
    original = engine.Engine._step

    def dies(self, step, micro):
        if step == 4:
            raise RuntimeError("killed")
        return original(self, step, micro)

    monkeypatch.setattr(engine.Engine, "_step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train(config, tmp_path / "run", Listener.silent())
    monkeypatch.setattr(engine.Engine, "_step", original)
    resume(tmp_path / "run", Listener.silent())
    ours, theirs = (read_tensors(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_the_size_is_the_processors():
    card = Card("m", tiny.config("mask2former", "Mask2FormerConfig"), {"size": {"shortest_edge": 380}})
    assert card.size == 384
    assert dataclasses.replace(card, processor={}).size == 512
