"""The paragraph in Chinese, sentence by sentence."""

from __future__ import annotations

from maskloss.methods import formulas
from maskloss.methods.markup import Markup, amount, tex
from maskloss.methods.settings import Classification, MaskTerm, Matching, MethodSettings, Points


def paragraph(settings: MethodSettings, m: Markup) -> list[str]:
    """Write the title and the sentences that apply."""
    if settings.points is None:
        sentences = [m.title("基于采样点的匹配。"), *_matching(settings, m)]
    else:
        title = m.title("基于点采样的掩码损失。")
        sentences = [title, *_points(settings, settings.points, m), *_loss(settings, m), *_matching(settings, m)]
    return [*sentences, *_classes(settings, m), *_others(settings), *_differences(settings)]


def _points(settings: MethodSettings, points: Points, m: Markup) -> list[str]:
    papers = (
        f"遵循 PointRend{m.cite('kirillov2020pointrend')}与 Mask2Former{m.cite('cheng2022mask2former')}的做法"
        if points.importance_ratio
        else f"与 Mask2Former{m.cite('cheng2022mask2former')}相同，但不使用重要性采样"
    )
    whose = "解码器各层预测的掩码" if settings.layers_share else "预测掩码"
    size = "" if points.count is not None else f"（{m.math(formulas.SIZE)} 为预测掩码的尺寸）"
    start = f"{papers}，{whose}均在采样点上进行监督，每个匹配实例取 {m.math(formulas.number_of_points(points))} 个点"
    said = [f"{start}{size}{_chosen(points, m)}。"]
    if points.layout == "stratified":
        said.append(
            "均匀采样采用分层方式：要取多少个点，就把采样区域划分为多少个面积相等的单元，并在每个单元内均匀取一个点。"
        )
    if settings.valid_windows:
        said.append("采样点仅取自图像内部，不落在批次的填充区域。")
    return said


def _chosen(points: Points, m: Markup) -> str:
    if points.importance_ratio == 0:
        return "，全部为均匀随机点"
    uncertain, uniform = formulas.shares(points)
    most = f"{m.math(formulas.candidates(points))} 个均匀随机候选点中不确定性 {m.math('U(z) = -|z|')} 最高者"
    if points.importance_ratio == 1:
        return f"，均为 {most}"
    first, second = m.percent(points.importance_ratio), m.percent(round(1 - points.importance_ratio, 9))
    if not uncertain:
        return f"：其中 {first} 是 {most}，其余 {second} 为均匀随机点"
    return f"：其中 {uncertain} 个（{first}）是 {most}，其余 {uniform} 个（{second}）为均匀随机点"


def _loss(settings: MethodSettings, m: Markup) -> list[str]:
    said = [_reading(settings.term, m)]
    focal = settings.term.focal_gamma is not None
    name = (
        f"Focal 损失{m.cite('lin2017focal')}（{m.math(formulas.focal(settings.term))}；对采样点取平均）"
        if focal
        else "二元交叉熵（对采样点取平均）"
    )
    ce, dice = (
        m.math(f"{symbol} = {tex(weight)}")
        for symbol, weight in (
            (formulas.WEIGHT_CE, settings.ce_weight),
            (formulas.WEIGHT_DICE, settings.dice_weight),
        )
    )
    counted = "匹配实例" if settings.divisor == "matches" else "目标实例"
    said.append(
        f"掩码损失由{' ' if focal else ''}{name}与 Dice 损失{m.cite('milletari2016vnet')}组成，"
        f"权重分别为 {ce} 和 {dice}；"
        f"两项均对实例求和，再除以所有设备上整个批次的{counted}总数 {m.math('N')}。"
    )
    if settings.ignore_regions:
        said.append("落在忽略区域内的采样点权重为 0。")
    return said


def _reading(term: MaskTerm, m: Markup) -> str:
    z, t = m.math("z"), m.math("t")
    beyond = "" if term.padding_mode == "zeros" else "；边界之外取最近的像素，而 Mask2Former 以 0 填充"
    if term.target_mode == "bilinear":
        return f"预测的 logit {z} 与目标掩码 {t} 均以双线性插值在各自的原始分辨率上取值{beyond}。"
    return (
        f"预测的 logit {z} 以双线性插值取值；与 Mask2Former 不同，目标掩码 {t} 取最近的像素；"
        f"二者均在各自的原始分辨率上进行{beyond}。"
    )


def _matching(settings: MethodSettings, m: Markup) -> list[str]:
    matching = settings.matching
    if matching is None:
        return []
    papers = m.cite("carion2020detr", "kuhn1955hungarian")
    number = (
        amount(matching.points.count)
        if matching.points.count is not None
        else m.math(formulas.per_area(matching.points))
    )
    drawn = "分层采样点" if matching.points.layout == "stratified" else "均匀随机点"
    shared = "" if settings.layers_share else "（所有查询共用）"
    groups = f"在 {matching.groups} 组查询中分别" if matching.groups > 1 else ""
    said = [
        f"查询与目标的二部图匹配{groups}由匈牙利算法求解{papers}，匹配代价为 {m.math(formulas.cost(matching))}"
        f"{_class_symbol(matching, m)}；掩码项在每幅图像的 {number} 个{drawn}上计算{shared}。"
    ]
    own = settings.points is None or matching.term != settings.term
    if own:
        said.append(f"计算匹配代价时，{_reading(matching.term, m)}")
        if matching.term.focal_gamma is not None:
            said.append(f"其中 Focal 指 Focal 损失{m.cite('lin2017focal')}，{m.math(formulas.focal(matching.term))}。")
    if settings.points is None and settings.valid_windows:
        said.append("采样点仅取自图像内部，不落在批次的填充区域。")
    if settings.points is None and settings.ignore_regions:
        said.append("落在忽略区域内的采样点权重为 0。")
    if settings.points is not None and matching.points.layout != settings.points.layout and drawn == "均匀随机点":
        said.append("匹配所用的采样点相互独立。")
    return said


def _class_symbol(matching: Matching, m: Markup) -> str:
    if not matching.class_weight:
        return ""
    if matching.classification == "softmax":
        return f"，其中 {m.math('p(c)')} 为目标类别的 softmax 概率"
    return f"，其中 {m.math(formulas.FOCAL_COST)} 为目标类别的 Focal 代价{m.cite('lin2017focal')}"


def _classes(settings: MethodSettings, m: Markup) -> list[str]:
    classes = settings.classification
    if classes is None:
        return []
    count = f" {amount(classes.num_classes)} 个类别" if classes.num_classes is not None else ""
    weight = amount(classes.weight)
    if classes.kind == "softmax":
        no_object = f"{m.quote('无目标')}类（权重 {amount(classes.no_object_weight)}）"
        joined = f"{count.lstrip()}外加{no_object}" if count else f"包含{no_object}"
        said = [f"分类采用{' ' if count else ''}{joined}的 softmax 交叉熵，损失权重为 {weight}。"]
    elif classes.kind == "focal":
        focal = m.math(formulas.FOCAL_CLASSES)
        covers = f"，覆盖{count}" if count else ""
        said = [
            f"分类损失为 sigmoid Focal 损失{m.cite('lin2017focal')}{covers}（{focal}），权重为 {weight}，"
            f"同样除以 {m.math('N')}。"
        ]
    else:
        quality = m.math(formulas.quality(classes.focal_alpha))
        covers = f"，覆盖{count}" if count else ""
        said = [
            f"分类损失为 sigmoid 交叉熵{covers}，权重为 {weight}，其目标值为由得分 {m.math('s')} "
            f"与边界框共同决定的质量 {quality}。"
        ]
    return said + _class_weights(classes)


def _class_weights(classes: Classification) -> list[str]:
    weights = classes.class_weights
    if weights is None:
        return []
    if len(weights) <= 10:
        return [f"各类别的权重依次为 {'、'.join(map(amount, weights))}。"]
    return [f"各类别单独加权，权重介于 {amount(min(weights))} 与 {amount(max(weights))} 之间。"]


def _others(settings: MethodSettings) -> list[str]:
    said = []
    if settings.box_weight or settings.giou_weight:
        said.append(
            f"边界框另有 L1 损失与 GIoU 损失，权重分别为 {amount(settings.box_weight)} 和 "
            f"{amount(settings.giou_weight)}。"
        )
    if settings.contrastive_weight:
        said.append(f"查询与文本之间另有对比损失，权重为 {amount(settings.contrastive_weight)}。")
    return said


def _differences(settings: MethodSettings) -> list[str]:
    """Say what is not as in Mask2Former although no option asks for it."""
    said = []
    if settings.layers_share:
        said.append("与 Mask2Former 不同，解码器各层在匹配时共用同一组采样点。")
        if settings.divisor == "matches":
            said.append("归一化所用的是匹配数，而非目标数。")
    classes = settings.classification
    if classes is not None and (classes.kind, classes.normalized) == ("softmax", "devices"):
        said.append("分类损失在所有设备上统一归一化。")
    return said
