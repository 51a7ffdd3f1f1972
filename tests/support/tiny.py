"""Tiny random models of every family, and batches for them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

CLASSES, QUERIES, POINTS, SIZE = 3, 6, 64, 64


def config(module: str, name: str, **options: Any) -> Any:
    """Make a configuration; skip the test where the installed Transformers does not have it."""
    try:
        found = importlib.import_module(f"transformers.models.{module}")
    except ModuleNotFoundError:
        pytest.skip(f"this Transformers has no {module}")
    return getattr(found, name)(**options)


def model_class(module: str, name: str) -> type[nn.Module]:
    found: type[nn.Module] = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
    return found


def swin() -> Any:
    stages = [f"stage{i}" for i in range(1, 5)]
    sizes = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": SIZE}
    return config("swin", "SwinConfig", out_features=stages, drop_path_rate=0.0, **sizes)


def mask2former(**options: Any) -> nn.Module:
    sizes = {
        "feature_size": 32,
        "mask_feature_size": 16,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 16,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "num_attention_heads": 2,
        "dim_feedforward": 16,
        "num_queries": QUERIES,
        "train_num_points": POINTS,
        "num_labels": CLASSES,
        "dropout": 0.0,
    }
    made = config("mask2former", "Mask2FormerConfig", backbone_config=swin(), **(sizes | options))
    return model_class("mask2former", "Mask2FormerForUniversalSegmentation")(made)


def oneformer(**options: Any) -> nn.Module:
    sizes = {
        "conv_dim": 64,
        "mask_dim": 64,
        "hidden_dim": 64,
        "encoder_feedforward_dim": 16,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "num_attention_heads": 2,
        "dim_feedforward": 16,
        "num_queries": QUERIES,
        "train_num_points": POINTS,
        "num_labels": CLASSES,
        "dropout": 0.0,
        "task_seq_len": 5,
        "text_encoder_width": 64,
        "text_encoder_context_length": 5,
        "text_encoder_num_layers": 1,
        "text_encoder_vocab_size": 50,
        "text_encoder_n_ctx": 2,
        "is_training": True,
    }
    made = config("oneformer", "OneFormerConfig", backbone_config=swin(), **(sizes | options))
    return model_class("oneformer", "OneFormerForUniversalSegmentation")(made)


def _eomt(module: str, prefix: str, options: dict[str, Any]) -> nn.Module:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": SIZE,
        "patch_size": 16,
        "num_upscale_blocks": 1,
        "num_blocks": 2,
        "num_queries": QUERIES,
        "train_num_points": POINTS,
        "num_labels": CLASSES,
        "num_register_tokens": 1,
    }
    made = config(module, f"{prefix}Config", **(sizes | options))
    return model_class(module, f"{prefix}ForUniversalSegmentation")(made)


def eomt(**options: Any) -> nn.Module:
    return _eomt("eomt", "Eomt", options)


def eomt_dinov3(**options: Any) -> nn.Module:
    return _eomt("eomt_dinov3", "EomtDinov3", options)


def videomt(**options: Any) -> nn.Module:
    return _eomt("videomt", "Videomt", options)


def rf_detr(**options: Any) -> nn.Module:
    backbone = config(
        "rf_detr",
        "RfDetrDinov2Config",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        num_windows=2,
        out_features=["stage1", "stage2"],
    )
    sizes = {
        "d_model": 32,
        "decoder_ffn_dim": 16,
        "decoder_layers": 2,
        "decoder_self_attention_heads": 2,
        "decoder_cross_attention_heads": 2,
        "num_queries": QUERIES,
        "group_detr": 2,
        "dropout": 0.0,
        "num_labels": CLASSES,
        "c2f_num_blocks": 1,
        "mask_point_sample_ratio": 4,
        "intermediate_size": 16,
    }
    made = config("rf_detr", "RfDetrConfig", backbone_config=backbone, **(sizes | options))
    return model_class("rf_detr", "RfDetrForInstanceSegmentation")(made)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "mask2former": mask2former,
    "oneformer": oneformer,
    "eomt": eomt,
    "eomt_dinov3": eomt_dinov3,
    "videomt": videomt,
    "rf_detr": rf_detr,
}


def build(family: str, **options: Any) -> Any:
    """A model in training, with larger masks than a new one's: new models have near ties everywhere."""
    model = BUILDERS[family](**options)
    model.train()
    for name, parameter in model.named_parameters():
        if "mask" in name and parameter.ndim > 1:
            parameter.data *= 2
    return model


def blobs(counts: tuple[int, ...] = (2, 3), size: tuple[int, int] = (SIZE, SIZE), seed: int = 0) -> list[Tensor]:
    """Rectangles, float as the image processors make them: `[T, H, W]` for each image."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for count in counts:
        masks = torch.zeros(count, *size)
        for mask in masks:
            low = (torch.rand(2, generator=generator) * 0.5 * torch.tensor(size)).long().tolist()
            high = [int(a + s * 0.4) for a, s in zip(low, size, strict=True)]
            mask[low[0] : high[0], low[1] : high[1]] = 1
        images.append(masks)
    return images


def labels_of(masks: list[Tensor], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    return [torch.randint(CLASSES, (len(each),), generator=generator) for each in masks]


def pixels(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed + 2))


def boxes_of(masks: list[Tensor]) -> list[Tensor]:
    """(cx, cy, w, h) of masks, as fractions."""
    found = []
    for image in masks:
        height, width = image.shape[1:]
        rows = []
        for mask in image:
            y, x = mask.nonzero(as_tuple=True)
            left, top, right, bottom = x.min(), y.min(), x.max() + 1, y.max() + 1
            rows.append(
                [
                    (left + right) / 2 / width,
                    (top + bottom) / 2 / height,
                    (right - left) / width,
                    (bottom - top) / height,
                ]
            )
        found.append(torch.tensor(rows).reshape(-1, 4))
    return found


def batch_for(family: str, masks: list[Tensor] | None = None) -> dict[str, Any]:
    """The keyword arguments of a training step."""
    masks = blobs() if masks is None else masks
    classes = labels_of(masks)
    batch: dict[str, Any] = {"pixel_values": pixels(len(masks))}
    if family == "rf_detr":
        columns = zip(classes, boxes_of(masks), masks, strict=True)
        return batch | {"labels": [{"class_labels": c, "boxes": b, "masks": m} for c, b, m in columns]}
    batch |= {"mask_labels": masks, "class_labels": classes}
    if family == "oneformer":
        generator = torch.Generator().manual_seed(5)
        batch["task_inputs"] = torch.randint(50, (len(masks), 5), generator=generator)
        batch["text_inputs"] = torch.randint(50, (len(masks), QUERIES - 2, 5), generator=generator)
    return batch


def run(model: Any, family: str, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss, and every term of it under its name; a term of EoMT's layer i ends in `@i`."""
    # Dropout and the jitter of positions are the same in every run; the criterion draws after them.
    torch.manual_seed(7)
    terms: dict[str, Tensor] = {}
    if family == "rf_detr":
        out = model(**batch)
        return out.loss, dict(out.loss_dict)
    calls = 0
    inner = model.get_loss_dict

    def spy(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        nonlocal calls
        found: dict[str, Tensor] = inner(*args, **kwargs)
        terms.update({f"{name}@{calls}": value.detach().clone() for name, value in found.items()})
        calls += 1
        return found

    model.get_loss_dict = spy
    try:
        if family == "videomt":
            return _run_videomt(model, batch), terms
        return model(**batch).loss, terms
    finally:
        del model.get_loss_dict


def _run_videomt(model: Any, batch: dict[str, Any]) -> Tensor:
    """VidEoMT's own forward takes no targets: its criterion is called on the predictions of single frames."""
    out = model(pixel_values_videos=batch["pixel_values"][:, None])
    names = ("masks_queries_logits", "class_queries_logits")
    predictions = {name: getattr(out, name) for name in names}
    targets = {name: batch[name] for name in ("mask_labels", "class_labels")}
    losses = model.get_loss_dict(**predictions, **targets, auxiliary_predictions=None)
    total: Tensor = model.get_loss(losses)
    return total


def accepts(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter that has one."""
    model.zero_grad()
    loss.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
