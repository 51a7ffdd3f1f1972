"""The sentences in Chinese; `facts` decides which of them are said, and what fills their slots."""

from __future__ import annotations

JOINER = ""

SENTENCES = {
    "title.loss": "基于采样点的掩码损失。",
    "title.matching": "基于采样点的匹配。",
    "title.training": "训练。",
    # What is supervised, and where.
    "points.following": "遵循 PointRend[@kirillov2020pointrend]与 Mask2Former[@cheng2022mask2former]的做法，我们在采样"
    "点上监督{what}。",
    "points.without_importance": "与 Mask2Former[@cheng2022mask2former]相同，但不使用重要性采样，我们在采样点上监督"
    "{what}。",
    "what.layers": "解码器各层的掩码预测",
    "what.masks": "掩码预测",
    "points.mixed": "每个匹配实例取 {points} 个点，其中 {uncertain}按预测的不确定性选取（{uncertainty}，$z$ 为该点处预"
    "测的 logit），其余 {uniform}均匀随机采样。",
    "points.uncertain": "每个匹配实例取 {points} 个点，全部按预测的不确定性选取（{uncertainty}，$z$ 为该点处预测的 "
    "logit）。",
    "points.uniform": "每个匹配实例取 {points} 个均匀随机点。",
    "uncertainty": "$U(z) = -|z|$",
    "uncertainty.shown": "$U(z)$，见式~{#uncertainty}",
    "share": "{share%} ",
    "share.counted": "{share%}（{count} 个）",
    "points.candidates": "前者是 {candidates} 个均匀随机候选点中不确定性最高者。",
    "points.candidates.all": "它们是 {candidates} 个均匀随机候选点中不确定性最高者。",
    "points.size": r"这里 $h \times w$ 为预测掩码的尺寸。",
    "points.stratified": "均匀采样采用分层方式：要取多少个点，就把图像划分为多少个面积相等的单元，并在每个单元内均匀取"
    "一个点。",
    "points.windows": "采样点仅取自图像内部，不落在批次的填充区域。",
    "clips.all": "视频片段中的每个实例在所有帧中共用一个查询，并在每一帧分别取采样点，未出现该实例的帧也不例外。",
    "clips.present": "视频片段中的每个实例在所有帧中共用一个查询，并在其出现的每一帧分别取采样点。",
    "clips.clip": "视频片段中的每个实例在所有帧中共用一个查询，其采样点分布于全部帧。",
    "clips.volume": "掩码为三维体数据，采样点取自三维空间。",
    "logits.loss": "预测的 logit",
    "logits.cost": "计算匹配代价时，预测的 logit",
    "reading.bilinear.zeros": "{logits} $z$ 与目标掩码 $t$ 均在各自的原始分辨率上以{linearly}取值。",
    "reading.bilinear.border": "{logits} $z$ 与目标掩码 $t$ 均在各自的原始分辨率上以{linearly}取值，{place}之外取最近的"
    "{pixel}（Mask2Former 取 0）。",
    "reading.nearest.zeros": "{logits} $z$ 以{linearly}取值，目标掩码 $t$ 则与 Mask2Former 不同，取最近的{pixel}；二者"
    "均在各自的原始分辨率上进行。",
    "reading.nearest.border": "{logits} $z$ 以{linearly}取值，目标掩码 $t$ 则与 Mask2Former 不同，取最近的{pixel}；二"
    "者均在各自的原始分辨率上进行，{place}之外取最近的{pixel}（Mask2Former 取 0）。",
    "linearly.plane": "双线性插值",
    "linearly.volume": "三线性插值",
    "pixel.plane": "像素",
    "pixel.volume": "体素",
    "place.plane": "图像",
    "place.volume": "体数据",
    "coordinates": r"对高 $h$、宽 $w$ 的掩码，点 $(x, y) \in [0, 1]^2$ 的像素坐标见式~{#coordinates}，其 logit 见式~"
    r"{#interpolation}。",
    "coordinates.volume": r"对含 $d$ 个切片、高 $h$、宽 $w$ 的掩码，点 $(x, y, q) \in [0, 1]^3$ 的体素坐标见式~"
    r"{#coordinates}，其 logit 见式~{#interpolation}。",
    # The loss and its weights.
    "loss": "掩码损失是{entropy}与 Dice 损失[@milletari2016vnet]{=dice}的加权和{=total}，权重为 {ce_weight} 和 "
    "{dice_weight}。",
    "name.ce": "二元交叉熵{=ce}",
    "name.focal": " Focal 损失[@lin2017focal]（{focal}）{=ce,focal}",
    "equation": "（式~{number0}）",
    "equations": "（式~{number0} 和式~{number1}）",
    "loss.divided": "前者先在每个实例的采样点上取平均；两项均对{summed}求和，再除以所有设备上整个批次的{counted}。",
    "summed.instances": "实例",
    "summed.frames": "实例及各帧",
    "dice.soft": "Dice 的分母取两个面积的平方和，因此即使目标为软标签，其最小值也在预测等于目标处取得。",
    "dice.semimetric": "Dice 以预测与目标中较小者作为重叠[@wang2023dice]，因此即使目标为软标签，其最小值也在预测等于目"
    "标处取得。",
    "counted.matches": "匹配实例总数 $N$（Mask2Former 采用目标总数）",
    "counted.targets": "目标实例总数 $N$",
    "counted.groups": "目标实例总数与查询组数 {groups} 之积 $N$",
    "counted.all": "匹配实例的总帧数 $N$",
    "counted.present": "匹配实例出现的总帧数 $N$",
    "ignored": "每个采样点有一个权重 $w_{np}$：在忽略区域内为 0，在其余位置为 1。",
    "classes.softmax": "查询的分类采用{over}外加“无目标”类（权重 {no_object}）的 softmax 交叉熵，在总损失中的权重为 "
    "{weight}{normalized}。",
    "classes.normalized": "；与 Mask2Former 不同，它在所有设备上统一归一化",
    "classes.focal": r"查询的分类采用覆盖{over}的 sigmoid Focal 损失[@lin2017focal]（$\alpha = 0.25, \; \gamma = 2$）"
    r"，在总损失中的权重为 {weight}，同样除以 $N$。",
    "classes.quality": "查询的分类采用覆盖{over}的 sigmoid 交叉熵，在总损失中的权重为 {weight}；其目标值是由得分 $s$ "
    "与边界框共同决定的质量 {quality}。",
    "over": " {count} 个类别",
    "over.one": "单个类别",
    "over.all": "全部类别",
    "class_weights.few": "各类别的权重依次为 {weights}。",
    "class_weights.many": "各类别单独加权，权重介于 {least} 与 {most} 之间。",
    "boxes": "边界框另有 L1 损失与 GIoU 损失，权重分别为 {box_weight} 和 {giou_weight}。",
    "contrastive": "查询与文本之间另有对比损失，权重为 {contrastive_weight}。",
    # The matching.
    "matching": "预测与目标之间的二部图匹配{per_group}由匈牙利算法求解[@carion2020detr,kuhn1955hungarian]，匹配代价为 "
    "{cost}{symbol}。",
    "matching.groups": "在 {groups} 组查询中分别",
    "symbol.softmax": "，其中 $p(c)$ 为目标类别的预测概率",
    "symbol.focal": r"，其中 $\mathcal{F}(c)$ 为目标类别的 Focal 代价[@lin2017focal]",
    "matching.dice.standard": "代价采用通常的 Dice。",
    "matching.dice.soft": "代价中 Dice 的分母取两个面积的平方和。",
    "matching.dice.semimetric": "代价中的 Dice 以预测与目标中较小者作为重叠[@wang2023dice]。",
    "matching.focal": "Focal 指 Focal 损失[@lin2017focal]，{focal}。",
    "matching.points": "代价中的掩码项在{per}的 {number} 个{drawn}上计算，这些点由{shared}。",
    "matching.frame": "匹配以整个片段为单位，各帧使用相同的采样点。",
    "per.image": "每幅图像",
    "per.frame": "每一帧",
    "per.clip": "每个片段",
    "per.volume": "每个体数据",
    "drawn.independent": "均匀随机点",
    "drawn.stratified": "分层采样点",
    "shared.queries": "所有查询共用",
    "shared.layers": "所有查询共用；与 Mask2Former 不同，解码器各层也共用这些点",
    "matching.independent": "匹配所用的采样点不分层。",
    "maskloss": "我们使用 maskloss[@maskloss]。",
    "maskloss.version": "我们使用 maskloss {version}[@maskloss]。",
    # The training run.
    "training": "我们{start}训练{trained}（{queries} 个查询，参数量 {millions}M）{data}，输入尺寸为 {input} 像素，批"
    "大小为 {batch_size}，共训练 {steps} 步{numbers}。",
    "model.compact": " maskloss 的紧凑模型",
    "model.named": " {model}",
    "start.scratch": "从随机初始化开始",
    "start.pretrained": "从 {pretrained} 的权重开始",
    "data.digits": "，数据为合成的手写数字场景",
    "precision.bf16": "，采用 bfloat16 混合精度",
    "precision.fp16": "，采用 float16 混合精度",
    "optimizer": "优化器为 AdamW[@loshchilov2019adamw]，最高学习率为 {lr}{backbone}，权重衰减为 {weight_decay}"
    "{clipped}。",
    "backbone": "（骨干网络为其 {backbone_share} 倍）",
    "backbone.layers": "（骨干网络最后一个模块为其 {backbone_share} 倍，此前各模块依次再乘以 {layer_decay}）",
    "backbone.frozen": "（骨干网络冻结）",
    "clip": "，梯度范数裁剪至 {clip}",
    "schedule.cosine": "学习率{rise}按余弦曲线降至 0。",
    "schedule.linear": "学习率{rise}线性降至 0。",
    "schedule.constant": "学习率{rise}保持不变。",
    "rise": "在前 {warmup%} 的训练步内线性上升，随后",
    "augmentation": "训练图像的数据增强包括{side}的随机正方形裁剪、{flips}，以及亮度、对比度与色彩平衡的随机变化。",
    "side.image": "边长为图像长边 {least} 至 {most} 倍",
    "side.crop": "边长为 {least} 至 {most} 像素",
    "flips": "水平翻转",
    "flips.turns": "水平与垂直翻转、直角旋转",
    "crops": "训练图像为 {cropped} 像素的随机裁剪，不作其他增强。",
    "augmentation.none": "训练图像不作数据增强。",
    "planned": "学习率按 {planned} 步设定，训练在第 {steps} 步提前结束。",
    "ema_decay": "评估使用模型权重的指数滑动平均，衰减系数至多为 {ema_decay}。",
    "best": "我们保留训练过程中在留出图像上 AP 最高的权重（第 {best} 步）。",
}

# What the short style says otherwise, but for what it leaves out (`facts.LEFT_OUT`).
SHORT = SENTENCES | {
    "points.mixed": "我们在每个匹配实例的 {points} 个点上监督{what}[@kirillov2020pointrend,cheng2022mask2former]："
    "{uncertain}是 {candidates} 个均匀随机候选点中不确定性（{uncertainty}）最高者，其余 {uniform}为均匀随机点。",
    "points.uncertain": "我们在每个匹配实例的 {points} 个点上监督{what}[@kirillov2020pointrend,cheng2022mask2former]，"
    "它们是 {candidates} 个均匀随机候选点中不确定性（{uncertainty}）最高者。",
    "points.uniform": "我们在每个匹配实例的 {points} 个均匀随机点上监督{what}[@cheng2022mask2former]。",
    "what.layers": "掩码",
    "what.masks": "掩码",
    "share.counted": "{share%} ",
    "points.stratified": "均匀采样采用分层方式。",
    "points.windows": "采样点均在图像内部。",
    "loss": "损失是{entropy}（{ce_weight}）与 Dice[@milletari2016vnet]{=dice}（{dice_weight}）的加权和{=total}，对"
    "{summed}求和并除以{counted}。",
    "counted.matches": "匹配实例总数 $N$",
    "clips.all": "视频片段的每一帧分别取采样点。",
    "clips.present": "实例在其出现的每一帧分别取采样点。",
    "clips.clip": "采样点分布于片段的全部帧。",
    "clips.volume": "采样点取自三维体数据，以三线性插值取值。",
    "ignored": "忽略区域内的点权重 $w_{np}$ 为 0。",
    "classes.softmax": "分类采用{over}外加“无目标”类（权重 {no_object}）的 softmax 交叉熵，权重为 {weight}。",
    "classes.focal": r"分类采用覆盖{over}的 sigmoid Focal 损失[@lin2017focal]（$\alpha = 0.25, \; \gamma = 2$），权重"
    r"为 {weight}。",
    "classes.quality": "分类采用覆盖{over}的 sigmoid 交叉熵，目标值是得分 $s$ 与边界框的质量 {quality}，权重为 "
    "{weight}。",
    "matching": "匈牙利匹配[@carion2020detr,kuhn1955hungarian]{per_group}在{per}的 {number} 个{drawn}上最小化 "
    "{cost}{symbol}。",
}
