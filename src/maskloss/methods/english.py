"""The sentences in English; `facts` decides which of them are said, and what fills their slots."""

from __future__ import annotations

JOINER = " "

SENTENCES = {
    "title.loss": "Point-sampled mask loss.",
    "title.matching": "Point-sampled matching.",
    "title.training": "Training.",
    # What is supervised, and where.
    "points.following": "Following PointRend~[@kirillov2020pointrend] and Mask2Former~[@cheng2022mask2former], we "
    "supervise {what} at sampled points.",
    "points.without_importance": "As in Mask2Former~[@cheng2022mask2former], but without importance sampling, we "
    "supervise {what} at sampled points.",
    "what.layers": "every decoder layer's mask predictions",
    "what.masks": "mask predictions",
    "points.mixed": "For each matched instance we draw {points} points, of which {uncertain} are selected by "
    "prediction uncertainty {uncertainty}, where $z$ is the predicted logit, and {uniform} are drawn uniformly at "
    "random.",
    "points.uncertain": "For each matched instance we take {points} points, all of them selected by prediction "
    "uncertainty {uncertainty}, where $z$ is the predicted logit.",
    "points.uniform": "For each matched instance we draw {points} points uniformly at random.",
    "uncertainty": "$U(z) = -|z|$",
    "uncertainty.shown": "$U(z)$ (Eq.~{#uncertainty})",
    "share": "{share%}",
    "share.counted": "{share%} ({count})",
    "points.candidates": "The former are the most uncertain of {candidates} uniform candidates.",
    "points.candidates.all": "They are the most uncertain of {candidates} uniform candidates.",
    "points.size": r"Here, $h \times w$ is the size of a predicted mask.",
    "points.stratified": "Uniform draws are stratified: the image is divided into cells of equal area, one for each "
    "point to be drawn, and each cell receives one uniform point.",
    "points.windows": "Points are drawn inside the image only, never in the padding of the batch.",
    "clips.all": "An instance has one query for all frames of a clip; its points are drawn in each frame separately, "
    "even where it is absent.",
    "clips.present": "An instance has one query for all frames of a clip; its points are drawn in each frame "
    "separately, wherever it is present.",
    "clips.clip": "An instance has one query for all frames of a clip, and its points are spread over all of them.",
    "clips.volume": "Masks are volumes, and points are drawn in three dimensions.",
    "logits.loss": "Logits",
    "logits.cost": "In the matching cost, logits",
    "reading.bilinear.zeros": "{logits} $z$ and targets $t$ are interpolated {linearly}, each at its own resolution.",
    "reading.bilinear.border": "{logits} $z$ and targets $t$ are interpolated {linearly}, each at its own resolution; "
    "outside the {place}, the nearest {pixel} is used (0 in Mask2Former).",
    "reading.nearest.zeros": "{logits} $z$ are interpolated {linearly}, while targets $t$, unlike in Mask2Former, are "
    "taken from the nearest {pixel}, each at its own resolution.",
    "reading.nearest.border": "{logits} $z$ are interpolated {linearly}, while targets $t$, unlike in Mask2Former, "
    "are taken from the nearest {pixel}, each at its own resolution; outside the {place}, the nearest {pixel} is used "
    "(0 in Mask2Former).",
    "linearly.plane": "bilinearly",
    "linearly.volume": "trilinearly",
    "pixel.plane": "pixel",
    "pixel.volume": "voxel",
    "place.plane": "image",
    "place.volume": "volume",
    "coordinates": r"A point $(x, y) \in [0, 1]^2$ of a mask of height $h$ and width $w$ has the pixel coordinates of "
    r"Eq.~{#coordinates} and the logit of Eq.~{#interpolation}.",
    "coordinates.volume": r"A point $(x, y, q) \in [0, 1]^3$ of a mask of $d$ slices, height $h$ and width $w$ has the "
    r"voxel coordinates of Eq.~{#coordinates} and the logit of Eq.~{#interpolation}.",
    # The loss and its weights.
    "loss": "The mask loss{=total} is the weighted sum of {entropy} and Dice loss~[@milletari2016vnet]{=dice}, with "
    "{ce_weight} and {dice_weight}.",
    "name.ce": "binary cross-entropy{=ce}",
    "name.focal": "focal loss~[@lin2017focal] with {focal}{=ce,focal}",
    "equation": " (Eq.~{number0})",
    "equations": " (Eqs.~{number0} and~{number1})",
    "loss.divided": "The first term is averaged over points; both are summed over {summed} and divided by $N$, the "
    "number of {counted}.",
    "summed.instances": "instances",
    "summed.frames": "instances and frames",
    "dice.soft": "Dice squares both areas in its denominator, so that its minimum lies at the target even if that is "
    "soft.",
    "dice.semimetric": "Dice takes the smaller of prediction and target as their overlap~[@wang2023dice], so that its "
    "minimum lies at the target even if that is soft.",
    "counted.matches": "matched instances in the batch over all devices (Mask2Former counts targets)",
    "counted.targets": "target instances in the batch over all devices",
    "counted.groups": "target instances in the batch over all devices, times {groups} for the groups of queries",
    "counted.all": "frames of matched instances in the batch over all devices",
    "counted.present": "frames in which matched instances are present, in the batch over all devices",
    "ignored": "Each point has a weight $w_{np}$, which is 0 in ignored regions and 1 elsewhere.",
    "classes.softmax": "Classification is softmax cross-entropy over {over} and “no object” (weight {no_object}); it "
    "has weight {weight}{normalized}.",
    "classes.normalized": " and, unlike in Mask2Former, is normalized over all devices",
    "classes.focal": r"Classification is a sigmoid focal loss~[@lin2017focal] over {over} with $\alpha = 0.25, \; "
    r"\gamma = 2$; it has weight {weight} and is divided by $N$ as well.",
    "classes.quality": "Classification is sigmoid cross-entropy over {over}; it has weight {weight}, and its target is "
    "the quality {quality}, from the score $s$ of a query and the overlap of its box.",
    "over": "{count} classes",
    "over.one": "one class",
    "over.all": "all classes",
    "class_weights.few": "The classes are weighted by {weights}.",
    "class_weights.many": "The classes are weighted individually, from {least} to {most}.",
    "boxes": "Boxes add an L1 loss of weight {box_weight} and a GIoU loss of weight {giou_weight}.",
    "contrastive": "A contrastive loss between queries and texts has weight {contrastive_weight}.",
    # The matching.
    "matching": "Predictions are assigned to targets by Hungarian "
    "matching~[@carion2020detr,kuhn1955hungarian]{per_group} with the cost {cost}{symbol}.",
    "matching.groups": ", separately in each of {groups} groups of queries,",
    "symbol.softmax": ", where $p(c)$ is the predicted probability of the target class",
    "symbol.focal": r", where $\mathcal{F}(c)$ is the focal cost~[@lin2017focal] of the target class",
    "matching.dice.standard": "The cost has the usual Dice.",
    "matching.dice.soft": "Dice squares both areas in its denominator.",
    "matching.dice.semimetric": "Dice takes the smaller of prediction and target as their overlap~[@wang2023dice].",
    "matching.focal": "Focal is the focal loss~[@lin2017focal] with {focal}.",
    "matching.points": "Its mask terms use {number} {drawn} points {per}, shared by {shared}.",
    "matching.frame": "Clips are matched as a whole, at the same points in every frame.",
    "per.image": "per image",
    "per.frame": "per frame",
    "per.clip": "per clip",
    "per.volume": "per volume",
    "drawn.independent": "uniform",
    "drawn.stratified": "stratified",
    "shared.queries": "all queries",
    "shared.layers": "all queries and, unlike in Mask2Former, by all decoder layers",
    "matching.independent": "The points of the matching are not stratified.",
    "maskloss": "We use maskloss~[@maskloss].",
    "maskloss.version": "We use maskloss {version}~[@maskloss].",
    # The training run.
    "training": "We train {trained} ({queries} queries, {millions}M parameters){start}{data} on inputs of {input} "
    "pixels for {steps} steps with a batch size of {batch_size}{numbers}.",
    "model.compact": "the compact model of maskloss",
    "model.named": "{model}",
    "start.scratch": " from scratch",
    "start.pretrained": ", initialized from {pretrained},",
    "data.digits": " on synthetic scenes of handwritten digits,",
    "precision.bf16": " in bfloat16 mixed precision",
    "precision.fp16": " in float16 mixed precision",
    "optimizer": "The optimizer is AdamW~[@loshchilov2019adamw] with a peak learning rate of {lr}{backbone} and a "
    "weight decay of {weight_decay}{clipped}.",
    "backbone": " ({backbone_share} times that for the backbone)",
    "backbone.layers": " ({backbone_share} times that for the last block of the backbone, and a further factor of "
    "{layer_decay} for each block before it)",
    "backbone.frozen": " (the backbone is frozen)",
    "clip": "; gradients are clipped to a norm of {clip}",
    "schedule.cosine": "The learning rate {rise}decays to zero along a cosine.",
    "schedule.linear": "The learning rate {rise}decays linearly to zero.",
    "schedule.constant": "The learning rate {rise}stays constant.",
    "rise": "rises linearly over the first {warmup%} of the steps, then ",
    "augmentation": "Training images are augmented by random square crops of {side}, {flips}, and random changes of "
    "brightness, contrast, and color balance.",
    "side.image": "{least} to {most} times their longer side",
    "side.crop": "{least} to {most} pixels",
    "flips": "horizontal flips",
    "flips.turns": "horizontal and vertical flips, quarter turns",
    "crops": "Training images are random crops of {cropped} pixels, without further augmentation.",
    "augmentation.none": "Training images are not augmented.",
    "planned": "The schedule was planned for {planned} steps; training ended early, at step {steps}.",
    "ema_decay": "We evaluate an exponential moving average of the weights, with a decay of at most {ema_decay}.",
    "best": "We keep the weights with the highest AP on held-out images during training (step {best}).",
}

# What the short style says otherwise, but for what it leaves out (`facts.LEFT_OUT`).
SHORT = SENTENCES | {
    "points.mixed": "We supervise {what} at {points} points per matched "
    "instance~[@kirillov2020pointrend,cheng2022mask2former]: {uncertain} of highest uncertainty {uncertainty} among "
    "{candidates} uniform candidates, {uniform} uniform.",
    "points.uncertain": "We supervise {what} at {points} points per matched "
    "instance~[@kirillov2020pointrend,cheng2022mask2former]: those of highest uncertainty {uncertainty} among "
    "{candidates} uniform candidates.",
    "points.uniform": "We supervise {what} at {points} uniform points per matched instance~[@cheng2022mask2former].",
    "what.layers": "masks",
    "what.masks": "masks",
    "share.counted": "{share%}",
    "points.stratified": "Uniform points are stratified.",
    "points.windows": "Points lie inside the image.",
    "loss": "The loss{=total} is {entropy} ({ce_weight}) plus Dice~[@milletari2016vnet]{=dice} ({dice_weight}), "
    "summed over {summed} and divided by the number $N$ of {counted}.",
    "counted.matches": "matched instances",
    "counted.targets": "target instances",
    "counted.groups": "target instances times {groups}",
    "counted.all": "frames of matched instances",
    "counted.present": "frames in which matched instances are present",
    "clips.all": "Points are drawn in every frame of a clip.",
    "clips.present": "Points are drawn in every frame in which an instance is present.",
    "clips.clip": "Points are spread over all frames of a clip.",
    "clips.volume": "Points are drawn in volumes and read trilinearly.",
    "ignored": "Points in ignored regions have weight $w_{np}$ = 0.",
    "classes.softmax": "Classification is softmax cross-entropy of weight {weight} over {over} and “no object” (weight "
    "{no_object}).",
    "classes.focal": r"Classification is a sigmoid focal loss~[@lin2017focal] ($\alpha = 0.25, \; \gamma = 2$) of "
    "weight {weight} over {over}.",
    "classes.quality": "Classification is sigmoid cross-entropy of weight {weight} over {over}, whose target is "
    "{quality} for the score $s$.",
    "matching": "Hungarian matching~[@carion2020detr,kuhn1955hungarian]{per_group} minimizes {cost} at {number} "
    "{drawn} points {per}{symbol}.",
}
