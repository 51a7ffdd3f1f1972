"""A query model from scratch
==========================

A few dozen lines of PyTorch that find the rectangles of an image: queries, two layers of predictions, and
:class:`~maskloss.MaskCriterion`, which matches, classifies and compares masks.
"""

# %%
# Images with two or three bright rectangles, wide ones (class 0) and tall ones (class 1).

import torch
from torch import nn

from maskloss import MaskCriterion, MaskTargets, PointSampling, plots

SIZE = 64
torch.manual_seed(0)


def scene(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    image, masks, labels = 0.1 * torch.randn(1, SIZE, SIZE), torch.zeros(count, SIZE, SIZE, dtype=torch.bool), []
    for column, mask in enumerate(masks):
        tall = int(torch.randint(2, ()))
        height, width = (20, 9) if tall else (9, 20)
        top = int(torch.randint(SIZE - height, ()))
        left = 21 * column + int(torch.randint(22 - width, ()))
        mask[top : top + height, left : left + width] = True
        labels.append(tall)
        image[0, mask] = 0.5 + 0.5 * torch.rand(())
    return image, masks, torch.tensor(labels)


# %%
# The model. Every query is a vector, and a mask is its product with the features of each pixel.


class Finder(nn.Module):
    def __init__(self, queries: int = 6, width: int = 48) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 5, 2, 2), nn.GELU(), nn.Conv2d(width, width, 3, 2, 1), nn.GELU(),
            nn.Conv2d(width, width, 3, 1, 1),
        )  # fmt: skip
        self.place = nn.Parameter(torch.randn(1, width, SIZE // 4, SIZE // 4) * 0.3)
        self.queries = nn.Parameter(torch.randn(1, queries, width))
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(width, 4, 96, 0.0, batch_first=True) for _ in range(2))
        self.classify, self.embed = nn.Linear(width, 3), nn.Linear(width, width)  # two classes, and "no object"

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        features = self.features(images) + self.place
        queries, classes, masks = self.queries.expand(len(images), -1, -1), [], []
        for layer in self.layers:
            queries = layer(queries, features.flatten(2).mT)
            classes.append(self.classify(queries))
            masks.append(torch.einsum("bqd,bdhw->bqhw", self.embed(queries), features))
        return classes, masks


# %%
# The loop. The criterion takes the logits of both layers, and targets that are packed at one bit per pixel.

model = Finder()
criterion = MaskCriterion(num_classes=2, sampling=PointSampling(num_points=256))
optimizer = torch.optim.AdamW(model.parameters(), 2e-3)

history = []
for _ in range(500):
    images, masks, labels = zip(*(scene(2 + number % 2) for number in range(4)), strict=True)
    targets = [
        {"masks": MaskTargets.from_masks(mask), "labels": label} for mask, label in zip(masks, labels, strict=True)
    ]
    out = criterion(*model(torch.stack(images)), targets)
    optimizer.zero_grad()
    out.total.backward()
    optimizer.step()
    history.append(float(out.total.detach()))

print(f"loss {history[0]:.1f} in the first step, {sum(history[-20:]) / 20:.1f} in the last twenty")

# %%
# What it finds in a new image: queries that are not "no object", and their masks.

image, masks, labels = scene(3)
with torch.no_grad():
    classes, logits = (layers[-1][0] for layers in model(image[None]))
scores, kinds = classes.softmax(-1)[:, :2].max(-1)
found = [query for query in range(len(scores)) if scores[query] > 0.5]

figure = plots.new_figure(9, 3.2)
left, right = figure.subplots(1, 2)
colors = ["#0b7285", "#e8590c", "#4c74e6", "#b86bb0", "#0fa37a", "#f5a300"]
shown = image.clamp(0, 1).expand(3, -1, -1)
plots.draw_instances(left, shown, masks, [["wide", "tall"][kind] for kind in labels], colors[: len(masks)])
left.set_title("truth")
large = nn.functional.interpolate(logits[None], (SIZE, SIZE), mode="bilinear")[0]
names = [f"{['wide', 'tall'][kinds[query]]} {scores[query]:.0%}" for query in found]
plots.draw_instances(right, shown, large[found] > 0, names, colors[: len(found)])
right.set_title("found")
