"""The recipes in examples/ run as they are, on a tiny model and a tiny data set."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from maskloss import step, step_totals
from support import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"

# What other libraries warn of in their own code is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"recipe_{name}", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def coco(tmp_path: Path) -> dict[str, str]:
    """Four images with colored rectangles, as polygons and as RLE, of two classes; and a tiny Mask2Former."""
    pytest.importorskip("transformers")
    image_module = pytest.importorskip("PIL.Image")
    pytest.importorskip("pycocotools")
    annotations: list[dict[str, Any]] = []
    images = []
    for number, (height, width) in enumerate([(40, 60), (64, 64), (50, 30), (33, 77)]):
        pixels = np.full((height, width, 3), 90, np.uint8)
        pixels[5:20, 4:16], pixels[22:31, 10:28] = (200, 30, 30), (30, 30, 220)
        image_module.fromarray(pixels).save(tmp_path / f"{number}.png")
        images.append({"id": number + 10, "file_name": f"{number}.png", "height": height, "width": width})
        polygon = [4, 5, 16, 5, 16, 20, 4, 20]
        mask = np.zeros((height, width), bool)
        mask[22:31, 10:28] = True
        runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel().astype(int), prepend=2, append=2))).tolist()
        rle = {"size": [height, width], "counts": runs}
        shared = {"image_id": number + 10, "iscrowd": 0}
        annotations += [
            shared | {"category_id": 7, "segmentation": [polygon]},
            shared | {"category_id": 3, "segmentation": rle},
        ]
    annotations.append({"image_id": 10, "category_id": 3, "iscrowd": 1, "segmentation": rle | {"size": [40, 60]}})
    categories = [{"id": 3, "name": "blue"}, {"id": 7, "name": "red"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    tiny.mask2former().save_pretrained(tmp_path / "model")
    names = {"images": "", "annotations": "instances.json", "model": "model"}
    return {name: str(tmp_path / path) for name, path in names.items()}


def options(coco: dict[str, str], **more: Any) -> list[str]:
    return [text for name, value in (coco | more).items() for text in (f"--{name}", str(value))]


def test_the_folder_s_masks_are_those_drawn(coco: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = load("coco_folder", monkeypatch).CocoFolder(coco["images"], coco["annotations"], size=64)
    sample = data[1]
    assert data.names == ["blue", "red"]
    assert sample["class_labels"].tolist() == [1, 0]
    dense = sample["mask_labels"].dense()
    assert dense[1, 22:31, 10:28].all()
    assert dense[1].sum() == 9 * 18
    assert dense[0, 6:19, 5:15].all()
    assert sample["pixel_values"].shape == (3, 64, 64)


def test_trainer(coco: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    recipe = load("transformers_trainer", monkeypatch)
    given = options(coco, output=tmp_path / "out", size=64, steps=4, workers=0, rate=1e-3, accumulate=2)
    loss = recipe.main([*given, "--cpu"])
    assert 0 < loss < 100
    # What was saved is an ordinary Mask2Former.
    saved = recipe.Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "out")
    assert type(saved.criterion).__name__ == "Mask2FormerLoss"
    assert saved.config.id2label == {0: "blue", 1: "red"}


def test_accumulation_with_the_trainer_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    recipe = load("transformers_trainer", monkeypatch)
    if not hasattr(recipe.Trainer, "loss_is_scaled_for_ga"):
        pytest.skip("this Trainer divides by the number of micro-batches")
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "pixel_values": torch.randn(3, tiny.SIZE, tiny.SIZE, generator=generator),
            "mask_labels": torch.rand(count, tiny.SIZE, tiny.SIZE, generator=generator) > 0.5,
            "class_labels": torch.zeros(count, dtype=torch.int64),
        }
        for count in (1, 1, 3, 4)
    ]

    def collate(batch: Any) -> Any:
        lists = {name: [each[name] for each in batch] for name in batch[0]}
        return lists | {"pixel_values": torch.stack(lists["pixel_values"])}

    first: Any = tiny.mask2former()
    second = copy.deepcopy(first)
    for model in (first, second):
        recipe.patch(model)
    rate = {"lr": 0.01}
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        remove_unused_columns=False, use_cpu=True, report_to=[], max_grad_norm=0, save_strategy="no",
        lr_scheduler_type="constant", train_sampling_strategy="sequential",
    )  # fmt: skip
    optimizer = torch.optim.SGD(first.parameters(), **rate)
    trainer = recipe.ExactTrainer(
        model=first, args=settings, train_dataset=data, data_collator=collate, optimizers=(optimizer, None)
    )
    with step(seed=3):
        trainer.train()
        by_hand = torch.optim.SGD(second.train().parameters(), **rate)
        with step(totals=step_totals([[1, 1], [3, 4]], num_queries=tiny.QUERIES)):
            for batch in (data[:2], data[2:]):
                second(**collate(batch)).loss.backward()
        by_hand.step()
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_lightning(coco: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    recipe = load("lightning_module", monkeypatch)
    logged = recipe.main(options(coco, size=64, steps=3, workers=0, device="cpu"))
    assert {"loss", "loss_mask", "loss_dice", "loss_cross_entropy", "loss_mask_0"} <= set(logged)
    assert all(torch.isfinite(value) for value in logged.values())


def test_plain_loop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    history = load("plain_loop", monkeypatch).main(["--steps", "30"])
    assert len(history) == 30
    assert np.mean(history[-5:]) < 0.8 * np.mean(history[:5])
    assert "step  25" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["frame", "volume"])
def test_clips_and_volumes(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    history = load("clips_and_volumes", monkeypatch).main(["--steps", "60", "--unit", unit])
    assert len(history) == 60
    assert np.mean(history[-10:]) < 0.8 * np.mean(history[:5])
