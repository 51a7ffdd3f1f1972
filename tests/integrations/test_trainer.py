"""Patched models in Transformers' own Trainer: half precision, compiled, resumed, and on two processes."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from maskloss import step, step_totals
from maskloss.integrations.transformers import patch
from support import tiny

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

# What other libraries warn of in their own code is not ours to mend.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

COUNTS = (1, 3, 4, 2)
SEED = 3


def exact_trainer() -> Any:
    """The Trainer of the recipe in examples/, whose accumulation is exact."""
    folder = Path(__file__).parents[2] / "examples"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("recipe", folder / "transformers_trainer.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module.ExactTrainer


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(3, tiny.SIZE, tiny.SIZE, generator=generator),
            "mask_labels": torch.rand(count, tiny.SIZE, tiny.SIZE, generator=generator) > 0.5,
            "class_labels": torch.zeros(count, dtype=torch.int64),
        }
        for count in COUNTS
    ]


def collate(batch: list[dict[str, Tensor]]) -> dict[str, Any]:
    lists = {name: [each[name] for each in batch] for name in batch[0]}
    return lists | {"pixel_values": torch.stack(lists["pixel_values"])}


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return tiny.build(family)


def trainer_of(model: nn.Module, folder: Path, **options: Any) -> Any:
    settings = transformers.TrainingArguments(
        output_dir=str(folder), remove_unused_columns=False, use_cpu=True, report_to=[], max_grad_norm=0,
        per_device_train_batch_size=1, lr_scheduler_type="constant", logging_steps=1, **options,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    made = exact_trainer() if "gradient_accumulation_steps" in options else transformers.Trainer
    return made(model=model, args=settings, train_dataset=data(), data_collator=collate, optimizers=(optimizer, None))


@pytest.mark.parametrize("options", [{"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}])
def test_precision_and_compilation_need_nothing_else(options: dict[str, Any], tmp_path: Path) -> None:
    model = model_of("mask2former")
    before = [each.detach().clone() for each in model.parameters()]
    with patch(model):
        trainer = trainer_of(model, tmp_path, max_steps=2, save_strategy="no", **options)
        loss = trainer.train().training_loss
    assert 0 < loss < 200
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_resumed_runs_are_whole_runs(tmp_path: Path) -> None:
    """Points are drawn from PyTorch's generator, whose state the Trainer keeps."""
    whole, halves = model_of("eomt"), model_of("eomt")
    with patch(whole), patch(halves):
        trainer_of(whole, tmp_path / "whole", max_steps=4, save_strategy="no").train()
        trainer_of(halves, tmp_path / "halves", max_steps=2, save_steps=2).train()
        again = model_of("eomt")
        with patch(again):
            trainer_of(again, tmp_path / "halves", max_steps=4, save_steps=2).train(resume_from_checkpoint=True)
    for mine, other in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)


def _rank(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASKLOSS_BACKEND": "reference"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = model_of("eomt")
    options = {"ddp_backend": "gloo", "ddp_find_unused_parameters": True, "train_sampling_strategy": "sequential"}
    with patch(model), step(seed=SEED):
        trainer = trainer_of(
            model, Path(folder) / "out", max_steps=1, save_strategy="no", gradient_accumulation_steps=2, **options
        )
        trainer.train()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_that_accumulate_take_the_step_of_one(tmp_path: Path) -> None:
    """Four images: two on each process, one at a time."""
    if not hasattr(exact_trainer(), "loss_is_scaled_for_ga"):
        pytest.skip("this Trainer divides by the number of micro-batches")
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    model = model_of("eomt").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with patch(model, backend="reference"):
        totals = step_totals([list(COUNTS)], num_queries=tiny.QUERIES)
        for number, image in enumerate(data()):
            # As the Trainer deals batches out; each process numbers its images after those of the ones before.
            with step(totals=totals, seed=SEED, image_ids=[number % 2]):
                model(**collate([image])).loss.backward()
    optimizer.step()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
