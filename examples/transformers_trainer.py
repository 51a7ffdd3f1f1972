"""Fine-tune a Mask2Former on a COCO-style folder with the Trainer of Transformers, and with maskloss's criterion.

    python transformers_trainer.py --images train2017 --annotations instances_train2017.json --output out

Needs `pip install "maskloss[coco,transformers]" accelerate pillow`. What is saved is an ordinary Mask2Former: loading
it needs no maskloss.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from coco_folder import CocoFolder, collate
from transformers import Mask2FormerForUniversalSegmentation, Trainer, TrainingArguments

from maskloss import step, step_totals
from maskloss.integrations.transformers import patch


class ExactTrainer(Trainer):
    """Micro-batches that add up to the step: each divides by the instances of all of them, on all ranks."""

    loss_is_scaled_for_ga = True  # for the Trainer: do not divide by the number of micro-batches

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """Count the instances of the micro-batches of a step."""
        batches, _ = super().get_batch_samples(*args)
        counts = [[len(labels) for labels in batch["class_labels"]] for batch in batches]
        return batches, step_totals(counts, num_queries=self.model.config.num_queries, device=self.args.device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Tell the criterion these totals; in evaluation there are none."""
        with step(totals=num_items_in_batch):
            loss = super().compute_loss(model, inputs, return_outputs)
        # Releases that do not ask divide all the same.
        divided = num_items_in_batch is not None and not hasattr(Trainer, "loss_is_scaled_for_ga")
        return loss * self.current_gradient_accumulation_steps if divided else loss


def main(arguments: Sequence[str] | None = None) -> float:
    """Train; the mean loss of the steps is the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True, help="folder of the images")
    parser.add_argument("--annotations", required=True, help="COCO annotation file")
    parser.add_argument("--output", required=True, help="folder for the model")
    parser.add_argument("--model", default="facebook/mask2former-swin-tiny-coco-instance", help="where to start from")
    parser.add_argument("--size", type=int, default=512, help="side of the images, pixels")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=2, help="images per step and device")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    options = parser.parse_args(arguments)

    data = CocoFolder(options.images, options.annotations, options.size)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(
        options.model,
        id2label=dict(enumerate(data.names)),
        label2id={name: label for label, name in enumerate(data.names)},
        ignore_mismatched_sizes=True,  # a new classification head, if the classes are new
    )
    settings = TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.rate,
        max_grad_norm=0.01,  # Mask2Former's
        warmup_steps=min(10, options.steps // 10),
        logging_steps=max(1, options.steps // 20),
        save_strategy="no",
        dataloader_num_workers=options.workers,
        remove_unused_columns=False,  # the Trainer would drop what it finds in no data-set column
        use_cpu=options.cpu,
        report_to=[],
    )
    # One line; the Trainer above is needed for accumulation only.
    patch(model)
    trainer = ExactTrainer(model=model, args=settings, train_dataset=data, data_collator=collate)
    result = trainer.train()
    trainer.save_model()
    return float(result.training_loss)


if __name__ == "__main__":
    print(f"mean loss {main():.3f}")
