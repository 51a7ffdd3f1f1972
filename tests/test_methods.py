"""The text for the paper: that it says everything, that it is short, and that LaTeX can read it."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import shutil
import subprocess
from dataclasses import fields, replace
from itertools import pairwise, product

import pytest
import torch

from maskloss import (
    ClipOptions,
    HungarianMatcher,
    MaskCriterion,
    MaskLoss,
    MaskLossError,
    MaskOptions,
    PointSampling,
    methods,
)
from maskloss.lab.cli import main
from maskloss.methods import chinese, english, facts, sources
from maskloss.methods.markup import FORMATS, Markup, amount
from maskloss.methods.settings import NOT_DESCRIBED, Augmentation, Classification, Points, Training, settings_of

LANGUAGES, STYLES = ["en", "zh"], ["full", "short"]
TRAINING = Training(
    model="Mask2Former",
    pretrained="facebook/mask2former-swin_tiny",
    queries=100,
    parameters=47_400_000,
    size=512,
    crop=None,
    augmentation=Augmentation(0.6, 1.3),
    digits=False,
    steps=90_000,
    batch_size=16,
    lr=1e-5,
    backbone_share=0.1,
    weight_decay=0.05,
    clip=0.01,
    schedule="cosine",
    warmup=0.05,
    precision="bf16",
)

# Another value for every option of the constructors. A new option needs one here, and a sentence that changes with it.
CHANGES = {
    "num_classes": 81,
    "class_weight": 3.0,
    "ce_weight": 4.0,
    "mask_weight": 4.0,
    "dice_weight": 4.0,
    "no_object_weight": 0.2,
    "class_weights": [1.0] * 79 + [2.0],
    "classification": "focal",
    "padding_mode": "border",
    "target_mode": "nearest",
    "focal_gamma": 1.5,
    "dice": "soft",
    "num_points": 100,
    "oversample_ratio": 2.0,
    "importance_ratio": 0.5,
    "layout": "stratified",
    "ignore_value": 255,
    "groups": 13,
    "clips": ClipOptions(),
}
# The focal loss's alpha needs its gamma.
NEEDED = {"focal_alpha": {"focal_gamma": 2.0}}
CHANGES["focal_alpha"] = 0.3
SUBJECTS = {
    "criterion": (MaskCriterion, {"num_classes": 80}),
    "loss": (MaskLoss, {}),
    "matcher": (HungarianMatcher, {}),
    "sampling": (PointSampling, {}),
}


def public_options() -> list[tuple[str, str]]:
    """Every option of every public constructor, in pairs (subject, name)."""
    listed = [(subject, name) for subject, (kind, _) in SUBJECTS.items() for name in inspect.signature(kind).parameters]
    # The options of a group are given one by one, too.
    listed += [(subject, field.name) for subject, name in listed if name == "options" for field in fields(MaskOptions)]
    # `sampling` and `matcher` are objects with options of their own, listed for themselves.
    left_out = NOT_DESCRIBED | {"sampling", "matcher", "options", "kwargs"}
    return [(subject, name) for subject, name in listed if name not in left_out]


def made(subject, **options):
    kind, given = SUBJECTS[subject]
    options = given | options
    if "class_weights" in options:
        options["class_weights"] = torch.tensor(options["class_weights"])
    if subject == "sampling":
        return MaskCriterion(80, sampling=PointSampling(**options))
    return kind(**options)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize(("subject", "name"), public_options())
def test_every_option_changed_alone_changes_the_text(subject, name, lang, style):
    assert name in CHANGES, f"{name} is a new option: the text has to say it"
    before = made(subject, **NEEDED.get(name, {}))
    after = made(subject, **NEEDED.get(name, {}), **{name: CHANGES[name]})
    for form in FORMATS:
        # Without the equations, which must not be the only place where a setting is found.
        old, new = (
            methods.describe(each, lang=lang, format=form, style=style, formulas="none") for each in (before, after)
        )
        assert old != new, name
        value = CHANGES[name]
        if isinstance(value, float) and name != "importance_ratio":
            assert amount(value) in new, f"the value of {name} is not named"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_option_of_clips_is_heard(lang, style):
    options = [None, ClipOptions(), ClipOptions(frames="present"), ClipOptions(divide_by="frames")]
    options += [ClipOptions(unit="clip"), ClipOptions(unit="volume")]
    texts = {methods.describe(MaskCriterion(80, clips=each), lang=lang, style=style) for each in options}
    assert len(texts) == 6


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize(
    "name", ["class_weight", "dice_weight", "num_points", "target_mode", "padding_mode", "focal_gamma", "dice"]
)
def test_a_matcher_of_ones_own_is_described(name, lang):
    own = HungarianMatcher(**{name: CHANGES[name]})
    texts = {methods.describe(MaskCriterion(80, matcher=each), lang=lang) for each in (None, own)}
    assert len(texts) == 2


def test_the_backend_is_nobodys_business():
    own = HungarianMatcher(backend="reference")
    assert methods.describe(MaskCriterion(80, matcher=own)) == methods.describe(MaskCriterion(80))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("subject", ["criterion", "loss", "matcher"])
@pytest.mark.parametrize("fact", ["valid_windows", "ignore_regions"])
def test_what_targets_have_is_described(subject, fact, lang, style):
    module = made(subject)
    texts = {methods.describe(module, lang=lang, style=style, **{fact: given}) for given in (False, True)}
    assert len(texts) == 2


def changes_of(settings):
    """Settings with one field changed, for every field however deep."""
    other = {
        "count": 77, "area": 8, "layout": "stratified", "padding_mode": "border", "target_mode": "nearest",
        "focal_gamma": 1.0, "dice": "semimetric", "kind": "focal", "num_classes": 7, "class_weights": (0.5, 2.0),
        "normalized": "device", "classification": "focal", "divisor": "targets", "valid_windows": True,
        "ignore_regions": True, "groups": 13, "clips": ClipOptions(), "version": None,
        "model": None, "pretrained": None, "queries": 7, "parameters": 7, "size": 64, "crop": 96,
        "augmentation": None, "digits": True, "steps": 7, "batch_size": 7, "schedule": "linear", "precision": "no",
            "planned": 100_000, "ema_decay": 0.99, "best": 80_000,
    }  # fmt: skip
    for each in fields(settings):
        value = getattr(settings, each.name)
        if hasattr(value, "__dataclass_fields__"):
            yield from (
                (f"{each.name}.{name}", replace(settings, **{each.name: new})) for name, new in changes_of(value)
            )
        elif each.name in other:
            yield each.name, replace(settings, **{each.name: other[each.name]})
        elif isinstance(value, float):
            yield each.name, replace(settings, **{each.name: value * 0.5 + 0.125})
        else:
            assert each.name in {"focal_alpha", "backend"}, f"{each.name} is a new field: give it another value"


# Fields that say nothing by themselves: the area counts where there is no number of points, alpha only beside gamma or
# in other classifications, and the matcher's points are all uniform.
SILENT = {
    "points.area", "matching.points.area", "matching.points.oversample_ratio", "matching.points.importance_ratio",
    "classification.focal_alpha",
}  # fmt: skip
# What the short style leaves out: over what the classification is normalized.
SILENT_IN_SHORT = SILENT | {"classification.normalized"}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_field_of_the_settings_is_heard(lang, style):
    settings = replace(settings_of(MaskCriterion(80)), training=TRAINING)
    before = methods.describe(settings, lang=lang, style=style, formulas="none")
    changed = dict(changes_of(settings))
    assert len(changed) > 45
    silent = {
        name
        for name, each in changed.items()
        if methods.describe(each, lang=lang, style=style, formulas="none") == before
    }
    assert silent == (SILENT_IN_SHORT if style == "short" else SILENT)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_way_to_train_is_heard(lang):
    ways = [
        TRAINING,
        *(replace(TRAINING, schedule=kind) for kind in ("linear", "constant")),
        *(replace(TRAINING, precision=kind) for kind in ("fp16", "no")),
        replace(TRAINING, warmup=0.0),
        replace(TRAINING, clip=0.0),
        replace(TRAINING, backbone_share=1.0),
        replace(TRAINING, backbone_share=0.0),
        replace(TRAINING, layer_decay=0.8),
        replace(TRAINING, planned=120_000),
        replace(TRAINING, ema_decay=0.999),
        replace(TRAINING, best=80_000),
        replace(TRAINING, crop=96),
        replace(TRAINING, augmentation=None),
        replace(TRAINING, augmentation=None, crop=96),
        replace(TRAINING, augmentation=Augmentation(0.6, 1.3, turns=True)),
        replace(TRAINING, augmentation=Augmentation(0.5, 1.3)),
        replace(TRAINING, augmentation=Augmentation(0.6, 1.5)),
    ]
    base = settings_of(MaskCriterion(80))
    texts = {methods.describe(replace(base, training=each), lang=lang) for each in ways}
    assert len(texts) == len(ways)


def test_languages_have_the_same_sentences_with_the_same_slots():
    def slots(table):
        special = r"\$[^$]+\$|\[@[^]]+\]|\{[^}]+\}"
        return {key: sorted(set(re.findall(special, text)) - {"$N$"}) for key, text in table.items()}

    assert slots(english.SENTENCES) == slots(chinese.SENTENCES)
    assert set(facts.LEFT_OUT) <= set(english.SENTENCES)
    for language in (english, chinese):
        assert set(language.SHORT) == set(language.SENTENCES), "the short style has a sentence of its own"
        assert all("%" not in text.replace("%}", "}") for text in language.SHORT.values())


def test_every_sentence_is_said_by_something():
    said = set()

    class Noted(dict):
        def __getitem__(self, key):
            said.add(key)
            return super().__getitem__(key)

    base = replace(settings_of(MaskCriterion(80)), training=TRAINING)
    everything = [base, *DOCUMENTS.values(), *dict(changes_of(base)).values()]
    everything += [settings_of(MaskLoss(padding_mode=each, target_mode="nearest")) for each in ("zeros", "border")]
    everything += [settings_of(MaskLoss(sampling=PointSampling(importance_ratio=each))) for each in (0, 1)]
    everything += [sources.settings_from({}), settings_of(MaskCriterion(99, class_weights=[1.0] * 98 + [2.0]))]
    everything += [settings_of(MaskCriterion(80, matcher=HungarianMatcher(focal_gamma=2.0)))]
    for kind in ("soft", "semimetric"):
        everything += [settings_of(MaskCriterion(80, dice=kind, matcher=each)) for each in (None, HungarianMatcher())]
        everything += [settings_of(HungarianMatcher(dice=kind))]
    everything += [
        replace(base, training=replace(TRAINING, schedule=kind, precision="fp16", augmentation=None))
        for kind in ("linear", "constant")
    ]
    everything += [
        replace(base, training=replace(TRAINING, crop=96, augmentation=each))
        for each in (None, Augmentation(1, 2, True))
    ]
    everything += [replace(base, clips=ClipOptions(frames=each, divide_by="frames")) for each in ("all", "present")]
    assert base.matching is not None
    everything += [replace(base, divisor="targets", matching=replace(base.matching, groups=13))]
    everything += [settings_of(MaskCriterion(1))]
    everything += [replace(base, clips=ClipOptions(unit=unit)) for unit in ("clip", "volume")]
    everything += [replace(base, clips=ClipOptions(unit="volume"), term=MaskOptions(padding_mode="border"))]
    everything += [replace(base, training=replace(TRAINING, backbone_share=0.0))]
    stratified = PointSampling(layout="stratified")
    everything += [settings_of(MaskCriterion(80, sampling=stratified, matcher=HungarianMatcher()))]
    for settings, shown in product(everything, ("none", "all")):
        told = facts.paragraphs(settings, shown)
        markup = Markup(FORMATS["text"], "1", tuple(name for part in told for name in part.equations))
        table = Noted(english.SENTENCES)
        for part in told:
            _ = part.title and table[part.title]
            _ = [facts.write(each, table, markup) for each in part.sentences]
    assert set(english.SENTENCES) - said == set()


def words(text):
    """Count what is between spaces in the paragraphs, without equations and references."""
    return sum(len(part.split()) for part in text.split("\n\n") if not part.startswith(("    ", "[1] ")))


def test_the_text_of_the_defaults_says_what_a_methods_section_needs_in_220_words():
    text = methods.describe(MaskCriterion(num_classes=80))
    assert words(text) <= 220
    supervised, loss, total, ce, dice, matching, references = text.split("\n\n")
    for where, parts in (
        (supervised, ["PointRend", "Mask2Former", "P = 12,544", "of which 75% (9,408) are selected by prediction "
                      "uncertainty U(z) = −|z|, where", "25% (3,136) are drawn uniformly at random", "3P = 37,632",
                      "bilinearly, each at its own resolution"]),
        (loss, ["binary cross-entropy (Eq. 2)", "Dice loss [3] (Eq. 3)", "λ_ce = 5", "λ_dice = 5", "80 classes",
                "summed over instances and divided by N, the number of matched instances in the batch over all devices",
                "no object", "0.1"]),
        (matching, ["Hungarian", "−2 p(c) + 5 BCE + 5 Dice", "12,544 uniform points per image", "maskloss 0.1.0 [6]"]),
        (references, ["[6] The maskloss authors. maskloss: point-sampled mask losses for PyTorch. Version 0.1.0."]),
    ):  # fmt: skip
        for part in parts:
            assert part in where, part
    assert total.strip() == "L_mask = λ_ce L_ce + λ_dice L_dice    (1)"
    assert ce.strip().startswith("L_ce = ") and dice.strip().startswith("L_dice = ")


def test_the_short_style_is_one_paragraph_of_eighty_words():
    text, references = methods.describe(MaskCriterion(num_classes=80), style="short").split("\n\n")
    # Symbols and numbers of formulas are not words.
    assert len(re.findall(r"[A-Za-z][a-z-]+", text)) <= 80
    assert references.startswith("[1]")
    chinese_text = methods.describe(MaskCriterion(num_classes=80), style="short", lang="zh").split("\n\n")[0]
    assert len(chinese_text) <= 320


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("style", STYLES)
def test_equations_are_numbered_and_referred_to(lang, style, form):
    plain, focal = MaskCriterion(80), MaskCriterion(80, focal_gamma=2.0)
    for module, formulas, count in (
        (plain, "none", 0), (plain, "loss", 3), (focal, "loss", 4), (plain, "all", 6), (focal, "all", 7),
    ):  # fmt: skip
        text = methods.describe(module, lang=lang, style=style, format=form, formulas=formulas)
        numbers = {
            "text": re.findall(r"^    .*\((\d)\)$", text, re.MULTILINE),
            "markdown": re.findall(r"\\tag\{(\d)\}", text),
            "latex": re.findall(r"\\label\{eq:([\w-]+)\}", text),
        }[form]
        assert len(numbers) == count
        if form != "latex":
            assert numbers == [str(1 + number) for number in range(count)]
        pattern = r"(?:(?<=Eq\. )|(?<=Eqs\. )|(?<=Eqs\. \d and )|(?<=式 ))(\d)"
        found = re.findall(r"\\ref\{eq:([\w-]+)\}" if form == "latex" else pattern, text)
        assert sorted(found) == sorted(numbers)


def test_weights_are_introduced_where_regions_are_ignored():
    text = methods.describe(MaskLoss(), ignore_regions=True)
    assert "weight w_np, which is 0 in ignored regions" in text and "max(Σ_p w_np, 1)" in text
    assert "w_np" not in methods.describe(MaskLoss())
    assert methods.describe(HungarianMatcher(ignore_value=255)) == methods.describe(
        HungarianMatcher(), ignore_regions=True
    )


def test_percentages_have_no_space():
    for form in FORMATS:
        for lang in LANGUAGES:
            text = methods.describe(MaskCriterion(80), lang=lang, format=form)
            assert ("75\\%" if form == "latex" else "75%") in text


def test_the_chinese_text_has_the_terms_of_the_field():
    text = methods.describe(replace(settings_of(MaskCriterion(80)), training=TRAINING), lang="zh", formulas="all")
    text = "".join(part for part in text.split("\n\n") if not part.startswith(("    ", "[1] ")))
    for term in (
        "采样点", "掩码", "不确定性", "二元交叉熵", "二部图匹配", "匈牙利算法", "双线性插值", "12,544", "9,408", "75%",
        "学习率", "骨干网络",
    ):  # fmt: skip
        assert term in text, term
    assert not re.search(r"[,.;:] ?[\u4e00-\u9fff]", text), "punctuation between Chinese words is full-width"
    assert not re.search(r"[\u4e00-\u9fff][A-Za-z0-9]|[A-Za-z0-9%][\u4e00-\u9fff]", text), "Latin words stand apart"
    assert "  " not in text and not re.search(r" [，。；：（）]|[，。；：（）] ", text)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("lang", LANGUAGES)
def test_plain_text_holds_no_markup(lang, style):
    focal = MaskCriterion(80, focal_alpha=0.25, focal_gamma=2.0, sampling=PointSampling(4001, 1.7, 0.3))
    subjects = [MaskCriterion(80), MaskLoss(), HungarianMatcher(classification="focal"), focal]
    for module in (*subjects, replace(settings_of(focal), training=TRAINING)):
        shown = "none" if isinstance(module, HungarianMatcher) else "all"
        text = methods.describe(module, lang=lang, style=style, formulas=shown, ignore_regions=True)
        assert not set(text) & set("\\{}$~`")


def test_names_from_outside_are_escaped():
    settings = replace(settings_of(MaskCriterion(80)), training=replace(TRAINING, pretrained="a_b%\x1b$&"))
    assert "from a_b%?$&," in methods.describe(settings)
    assert r"from a\_b%?\$&," in methods.describe(settings, format="markdown")
    assert r"from a\_b\%?\$\&," in methods.describe(settings, format="latex")


def test_numbers_are_written_out():
    assert [amount(each) for each in (12544, 0.25, 1e-5, 5.0, 12544.0)] == ["12,544", "0.25", "0.00001", "5", "12,544"]


def test_counts_are_those_of_the_sampling():
    sampling = PointSampling(num_points=1001, oversample_ratio=1.7, importance_ratio=0.3)
    text = methods.describe(MaskLoss(sampling=sampling))
    for count in (sampling.num_points, sampling.num_candidates, sampling.num_uncertain, sampling.num_random):
        assert f"{count:,}" in text
    assert "⌊1.7P⌋ = 1,701" in text


@pytest.mark.parametrize(
    ("module", "cited"),
    [
        (MaskLoss(), ["kirillov2020pointrend", "cheng2022mask2former", "milletari2016vnet", "maskloss"]),
        (
            MaskLoss(sampling=PointSampling(importance_ratio=0)),
            ["cheng2022mask2former", "milletari2016vnet", "maskloss"],
        ),
        (
            MaskLoss(focal_gamma=2.0),
            ["kirillov2020pointrend", "cheng2022mask2former", "lin2017focal", "milletari2016vnet", "maskloss"],
        ),
        (HungarianMatcher(), ["carion2020detr", "kuhn1955hungarian", "maskloss"]),
    ],
)
def test_only_what_is_cited_is_in_the_references(module, cited):
    entries = methods.bibtex(module)
    assert re.findall(r"^@\w+\{(\w+),", entries, re.MULTILINE) == cited
    assert entries.count("{") == entries.count("}")
    latex = methods.describe(module, format="latex")
    assert set(",".join(re.findall(r"\\cite\{([^}]*)\}", latex)).split(",")) == set(cited)


def test_other_objects_have_no_description():
    with pytest.raises(MaskLossError, match=r"(?s)only losses of maskloss can be described.*got Linear"):
        methods.describe(torch.nn.Linear(1, 1))
    with pytest.raises(MaskLossError, match="lang must be one of en, zh"):
        methods.describe(MaskLoss(), lang="de")
    with pytest.raises(MaskLossError, match="format must be one of text, markdown, latex"):
        methods.describe(MaskLoss(), format="html")
    with pytest.raises(MaskLossError, match="style must be one of full, short"):
        methods.describe(MaskLoss(), style="long")
    with pytest.raises(MaskLossError, match="formulas must be one of none, loss, all"):
        methods.describe(MaskLoss(), formulas="some")
    with pytest.raises(MaskLossError, match="equations belong to a mask loss"):
        methods.describe(HungarianMatcher(), formulas="all")


# -------------------------------------------------------------------------------------------------------- command line


def printed(capsys, *arguments):
    assert main(["methods", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    assert main(["methods", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_the_command_prints_paragraph_and_references(capsys):
    criterion = MaskCriterion(80)
    out = printed(capsys, "--num-classes", 80)
    assert out == f"{methods.describe(criterion)}\n\n{methods.bibtex(criterion)}\n"
    latex = printed(capsys, "--num-classes", 80, "--format", "latex")
    body, comments = latex[: latex.index("\n% @")], latex[latex.index("\n% @") + 1 :]
    assert body.strip() == methods.describe(criterion, format="latex")
    assert all(line.startswith("%") for line in comments.splitlines())


def test_references_go_to_a_file(capsys, tmp_path):
    out = printed(capsys, "--subject", "loss", "--bib", tmp_path / "refs.bib")
    assert "@" not in out
    assert (tmp_path / "refs.bib").read_text() == methods.bibtex(MaskLoss()) + "\n"


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_file_of_options_and_single_ones_that_win(capsys, tmp_path, suffix):
    content = {"num_classes": 20, "dice_weight": 2.0, "sampling": {"num_points": 500}, "matcher": {"num_points": 90}}
    path = tmp_path / f"options.{suffix}"
    path.write_text(json.dumps(content))  # JSON is YAML
    out = printed(capsys, "--config", path, "--num-points", 600, "--matcher-dice-weight", 7)
    sampling = PointSampling(num_points=600)
    matcher = HungarianMatcher(num_points=90, dice_weight=7.0)
    assert out.startswith(methods.describe(MaskCriterion(20, dice_weight=2.0, sampling=sampling, matcher=matcher)))


def test_the_matcher_inherits_what_the_criterion_is_given():
    settings = sources.settings_from({"dice_weight": 2.0, "num_points": 300, "matcher": {"class_weight": 9.0}})
    assert settings.matching is not None
    assert (settings.matching.dice_weight, settings.matching.class_weight) == (2.0, 9.0)
    assert settings.matching.points.count == 300


def test_every_option_has_a_name_that_can_be_typed():
    known = set(sources.option_names()) | set(sources.matcher_options())
    assert known >= {name for subject, name in public_options() if subject != "loss"} - {"clips"}
    assert known >= {field.name for field in fields(ClipOptions)} and "kwargs" not in known


def test_groups_of_options_are_given_whole_or_one_by_one():
    by_name = {"num_points": 300, "layout": "stratified", "padding_mode": "border", "dice": "soft", "frames": "present"}
    grouped = {
        "sampling": {"num_points": 300, "layout": "stratified"},
        "options": {"padding_mode": "border", "dice": "soft"},
        "clips": {"frames": "present"},
    }
    group, clips = MaskOptions(padding_mode="border", dice="soft"), ClipOptions(frames="present")
    matcher = HungarianMatcher(num_points=300, layout="stratified", options=group, clips=clips, dice_weight=9.0)
    criterion = MaskCriterion(
        7, sampling=PointSampling(300, layout="stratified"), options=group, clips=clips, matcher=matcher
    )
    for options in (by_name, grouped):
        given = {**options, "num_classes": 7, "matcher": {"dice_weight": 9.0}}
        assert sources.settings_from(given) == settings_of(criterion)


def test_equations_are_those_of_the_unit_and_of_the_padding():
    volume = methods.describe(MaskLoss(clips=ClipOptions(unit="volume")), formulas="all")
    assert "(x, y, q) ∈ [0, 1]³" in volume and "s = q d − 1/2" in volume and "max(0, 1 − |s − k|)" in volume
    nearest = methods.describe(MaskLoss(clips=ClipOptions(unit="volume"), padding_mode="border", target_mode="nearest"))
    assert "targets t, unlike in Mask2Former, are taken from the nearest voxel" in nearest and "bilinear" not in nearest
    border = methods.describe(MaskLoss(padding_mode="border"), formulas="all")
    assert "u = min(max(x w − 1/2, 0), w − 1)" in border
    frames = methods.describe(MaskLoss(clips=ClipOptions()))
    assert "Σ_nf 1/P Σ_p" in frames and "summed over instances and frames" in frames


# Damaged and handwritten files: what they hold, and what the message says.
BAD_FILES = {
    "unknown.json": ('{"steps": 3}', "unknown: 'steps'"),
    "list.json": ("[1]", "holds a list"),
    "text.yaml": ("num_points", "holds a str"),
    "empty.yaml": ("", "holds a NoneType"),
    "cut.json": ("{", "Expecting property name"),
    "no-mapping.json": ('{"sampling": 5}', "sampling must be a mapping"),
    "no-mapping-either.json": ('{"matcher": null}', "matcher must be a mapping"),
    "zero.json": ('{"num_points": 0}', "num_points must be an integer, at least 1"),
    "no-classes.json": ('{"num_classes": 0}', "num_classes must be an integer, at least 1"),
    "unknown-inside.json": ('{"matcher": {"color": 1}}', "unknown: 'color'"),
    "twice.json": ('{"num_points": 7, "sampling": {"num_points": 8}}', "num_points is also in sampling"),
    "keys.yaml": ("sampling: {1: 2}", "unknown: 1"),
    "list-for-number.yaml": ("num_points: [1, 2]", "num_points must be a number or a word"),
    "words-for-numbers.yaml": ("class_weights: [a, b]", "class_weights must be a list of numbers"),
    "word-for-truth.json": ('{"valid_windows": "false"}', "valid_windows must be true or false"),
    "date.yaml": ("num_points: 2020-01-01", "got datetime.date"),
    "nan.json": ('{"mask_weight": NaN}', "got nan"),
    "infinite.yaml": ("mask_weight: .inf", "got inf"),
    "huge.json": ('{"num_points": ' + "9" * 4000 + "}", "num_points must be a number or a word"),
    "digits.json": ('{"num_points": ' + "9" * 5000 + "}", "Exceeds the limit"),
    "digits.yaml": ("num_points: " + "9" * 5000, "Exceeds the limit"),
    "hexadecimal.yaml": ("num_points: 0x" + "f" * 5000, "got int of many digits"),
    "long.json": ('{"classification": "' + "x" * 100_000 + '"}', "classification must be a number or a word"),
    "long-name.json": ('{"' + "x" * 100_000 + '": 1}', "unknown: 'xxx"),
    "long-list.json": ('{"num_points": [' + "1," * 100_000 + "1]}", "got [1, 1, 1"),
    "escape.json": ('{"layout": "\\u001b[31mred"}', r"'\x1b[31mred'"),
    "nested.json": ("[" * 100_000, "nested too deeply"),
    "nested.yaml": ("[" * 5_000, "nested too deeply"),
    "cycle.yaml": ("&a {sampling: *a}", "unknown: 'sampling'"),
    "cycle-in-a-value.yaml": ("num_points: &a [*a]", "got 1 x 1 x 1"),
    "laughs.yaml": (
        "a: &a [x, x, x]\n" + "".join(f"{n}: &{n} [*{m}, *{m}, *{m}]\n" for m, n in pairwise("abcdefghijklm"))
        + "num_points: *m\n", "unknown: 'a'",
    ),
    "indented.yaml": ("num_points: 5\n  dice_weight: 3", "line 2: mapping values are not allowed here"),
    "tab.yaml": ("sampling:\n\tnum_points: 5", "line 2: found character"),
    "object.yaml": ("!!python/object:os.system {}", "line 1: could not determine a constructor"),
    "tag.yaml": ("num_points: !!int ''", "a value does not fit its tag"),
    "list-as-key.yaml": ("? [1]\n: 2", "line 1: found unhashable key"),
    "utf16.yaml": ('{"num_points": 5}'.encode("utf-16"), "not text in UTF-8"),
    "latin1.yaml": ("# \xe9".encode("latin-1"), "not text in UTF-8"),
    "zeros.yaml": (bytes(100), "special characters are not allowed"),
    "picture.yaml": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "not text in UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_do_not_work_end_in_one_short_sentence(capsys, tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refused(capsys, "--config", path).replace(str(path), name)
    assert message in error
    assert error.count("\n") == 1 and len(error) < 600


def test_a_mark_at_the_start_of_a_file_is_no_part_of_it(capsys, tmp_path):
    for name, content in (("options.json", '{"num_points": 77}'), ("options.YAML", "num_points: 77")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert "P = 77" in printed(capsys, "--config", tmp_path / name)


def test_input_that_does_not_work(capsys, tmp_path):
    assert "no such file" in refused(capsys, "--config", tmp_path / "none.json")
    assert "is a folder" in refused(capsys, "--config", tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "is a named pipe" in refused(capsys, "--config", tmp_path / "pipe.yaml")
    assert "settings must come from one place" in refused(capsys, tmp_path, "--config", tmp_path)
    assert "has no run.json" in refused(capsys, tmp_path)
    assert "say themselves what their settings are" in refused(capsys, tmp_path, "--num-points", 5)
    assert "--standalone prints" in refused(capsys, "--standalone", "--format", "text")


@pytest.mark.parametrize("value", ["9" * 5000, "1.2.3", "nan", "-inf", "x" * 100_000, "1,a", ",", "1e999", "", "-"])
def test_single_options_that_do_not_work_end_in_one_short_sentence(capsys, value):
    error = refused(capsys, f"--num-points={value}")
    assert "num_points must be" in error and error.count("\n") == 1 and len(error) < 400


def test_the_entries_are_written_whole_or_not_at_all(capsys, tmp_path, monkeypatch):
    path = tmp_path / "refs.bib"
    path.write_text("mine")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "the disk is full" in refused(capsys, "--bib", path)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]
    assert capsys.readouterr().out == ""
    monkeypatch.undo()
    assert "no such file" in refused(capsys, "--bib", tmp_path / "nowhere" / "refs.bib")
    printed(capsys, "--bib", path)
    assert path.read_text().startswith("@inproceedings{kirillov2020pointrend")


def test_a_training_run(capsys, tmp_path, monkeypatch):
    from maskloss.lab.config import TrainConfig
    from maskloss.lab.loop.progress import Listener
    from maskloss.lab.loop.run import train

    monkeypatch.setattr("maskloss.lab.results.report.write", lambda *_: [])  # to draw it takes longer than to train
    config = TrainConfig(steps=2, batch_size=2, held_out=4, evaluations=1, num_points=32, workers=0)
    train(config, tmp_path / "run", Listener.silent())
    out = printed(capsys, tmp_path / "run")
    assert "P = 32" in out and "10 classes" in out and "it has weight 10" in out
    assert "on inputs of 64 × 64 pixels for 2 steps with a batch size of 2." in out
    assert "peak learning rate of 0.003 and a weight decay of 0.05; gradients are clipped to a norm of 1." in out
    assert "rises linearly over the first 5% of the steps" in out and "@inproceedings{loshchilov2019adamw" in out
    assert "We use maskloss 0.1.0" in out and "augmented" not in out

    # A run that does not know its version, or was given one by hand.
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    for version in (None, "1}\\input{x"):
        (tmp_path / "run" / "run.json").write_text(json.dumps({**facts, "version": version}))
        assert "We use maskloss [6]." in printed(capsys, tmp_path / "run")


@pytest.mark.parametrize("kind", ["Mask2Former", "OneFormer", "Eomt", "RfDetr"])
def test_a_configuration_of_transformers(capsys, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(num_labels=17)
    config.save_pretrained(tmp_path)
    out = printed(capsys, "--model", tmp_path)
    assert "17 classes" in out and "divided by N, the number of target instances" in out
    if kind == "RfDetr":
        for part in ("⌊hw / 16⌋", "13 groups", "nearest pixel", "5 L1", "2 GIoU", "s^0.25 IoU^0.75"):
            assert part in out, part
        return
    assert ("contrastive" in out) == (kind == "OneFormer")
    for name, value in {
        "train_num_points": 96, "oversample_ratio": 2.0, "importance_sample_ratio": 0.25, "mask_weight": 3.0,
        "dice_weight": 3.5, "class_weight": 1.5, "no_object_weight": 0.3,
    }.items():  # fmt: skip
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    out = printed(capsys, "--model", tmp_path)
    for part in (
        "P = 96",
        "25% (24)",
        "2P = 192",
        "λ_ce = 3",
        "λ_dice = 3.5",
        "−1.5 p(c) + 3 BCE + 3.5 Dice",
        "0.3",
    ):
        assert part in out, part


def test_other_models_are_refused(capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig().save_pretrained(tmp_path)
    assert "it is 'bert'" in refused(capsys, "--model", tmp_path)
    assert "must have a configuration" in refused(capsys, "--model", tmp_path / "nowhere")
    transformers.Mask2FormerConfig().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for value in ("a lot", None, [1], True, 10**400):
        (tmp_path / "config.json").write_text(json.dumps({**content, "dice_weight": value}))
        error = refused(capsys, "--model", tmp_path)
        assert "dice_weight" in error and error.count("\n") == 1 and len(error) < 500


# --------------------------------------------------------------------------------------------------------------- LaTeX

DOCUMENTS = {
    "defaults": settings_of(MaskCriterion(80)),
    "focal": replace(
        settings_of(MaskCriterion(80, focal_alpha=0.25, focal_gamma=2.0, padding_mode="border", target_mode="nearest")),
        ignore_regions=True,
        valid_windows=True,
        points=Points(None, 16, 1.7, 0.3, "stratified"),
        contrastive_weight=0.5,
        box_weight=5.0,
        giou_weight=2.0,
    ),
    "matcher": settings_of(HungarianMatcher(classification="focal", focal_gamma=2.0)),
    "quality": replace(
        settings_of(MaskCriterion(80)),
        classification=Classification("quality", class_weights=(1.0, 2.0)),
    ),
}


def engine(lang):
    """The command of a TeX engine that is installed; Chinese needs one that reads Unicode, and ctex."""
    if shutil.which("tectonic"):
        return ["tectonic"]
    names = ["xelatex", "lualatex"] if lang == "zh" else ["pdflatex", "xelatex", "lualatex"]
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        return None
    if lang == "zh" and subprocess.run(["kpsewhich", "ctexart.cls"], capture_output=True, check=False).returncode:
        return None
    return [found, "-interaction=nonstopmode", "-halt-on-error"]


@pytest.mark.parametrize("lang", LANGUAGES)
def test_latex_compiles(tmp_path, lang):
    command = engine(lang)
    if command is None:
        pytest.skip(f"NOT COMPILED ({lang}): install tectonic, or TeX Live with XeLaTeX (and its Chinese collection)")
    # One document with all of the paragraphs, and the references of the first.
    whole = methods.document(DOCUMENTS["defaults"], lang=lang)
    others = [methods.describe(each, lang=lang, format="latex") for each in DOCUMENTS.values()]
    entries = re.findall(
        r"^@.*?^\}$", "\n".join(methods.bibtex(each) for each in DOCUMENTS.values()), re.DOTALL | re.MULTILINE
    )
    whole = whole.replace(methods.bibtex(DOCUMENTS["defaults"]), "\n".join(dict.fromkeys(entries)))
    whole = whole.replace(r"\bibliographystyle", "\n\n".join([*others[1:], r"\bibliographystyle"]))
    (tmp_path / "paper.tex").write_text(whole, encoding="utf-8")

    def run(*arguments):
        done = subprocess.run(
            arguments, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-500:]

    run(*command, "paper.tex")
    if command[0] != "tectonic":
        run("bibtex", "paper")
        run(*command, "paper.tex")
        run(*command, "paper.tex")
        log = (tmp_path / "paper.log").read_text(encoding="utf-8", errors="replace")
        assert "undefined" not in log and "Missing character" not in log, log[-3000:]
    assert (tmp_path / "paper.pdf").stat().st_size > 5000


def test_what_names_hold_does_not_reach_a_terminal(capsys):
    from maskloss.lab.commands import methods as command

    command._print("a model \x1b[2Jcalled so\nand a second line")
    assert capsys.readouterr().out == "a model \\x1b[2Jcalled so\nand a second line\n"
