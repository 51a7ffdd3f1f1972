"""The paragraph for the paper: that it says everything, that it is short, and that LaTeX can read it."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
from dataclasses import fields, replace

import pytest
import torch

from maskloss import HungarianMatcher, MaskCriterion, MaskLoss, MaskLossError, PointSampling, methods
from maskloss.lab.cli import main
from maskloss.methods import sources
from maskloss.methods.markup import amount
from maskloss.methods.settings import NOT_DESCRIBED, Classification, MaskTerm, Points, settings_of

LANGUAGES, FORMATS = ["en", "zh"], ["text", "markdown", "latex"]

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
    "num_points": 100,
    "oversample_ratio": 2.0,
    "importance_ratio": 0.5,
    "layout": "stratified",
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
    # `sampling` and `matcher` are objects with options of their own, listed for themselves.
    return [(subject, name) for subject, name in listed if name not in NOT_DESCRIBED | {"sampling", "matcher"}]


def made(subject, **options):
    kind, given = SUBJECTS[subject]
    options = given | options
    if "class_weights" in options:
        options["class_weights"] = torch.tensor(options["class_weights"])
    if subject == "sampling":
        return MaskCriterion(80, sampling=PointSampling(**options))
    return kind(**options)


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize(("subject", "name"), public_options())
def test_every_option_changed_alone_changes_the_text(subject, name, lang):
    assert name in CHANGES, f"{name} is a new option: the paragraph has to say it"
    before = made(subject, **NEEDED.get(name, {}))
    after = made(subject, **NEEDED.get(name, {}), **{name: CHANGES[name]})
    for form in FORMATS:
        old, new = (methods.describe(each, lang=lang, format=form) for each in (before, after))
        assert old != new, name
        value = CHANGES[name]
        if isinstance(value, float) and name != "importance_ratio":
            assert amount(value) in new, f"the value of {name} is not named"


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize(
    "name", ["class_weight", "dice_weight", "num_points", "target_mode", "padding_mode", "focal_gamma"]
)
def test_a_matcher_of_ones_own_is_described(name, lang):
    own = HungarianMatcher(**{name: CHANGES[name]})
    texts = {methods.describe(MaskCriterion(80, matcher=each), lang=lang) for each in (None, own)}
    assert len(texts) == 2


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("subject", ["criterion", "loss", "matcher"])
@pytest.mark.parametrize("fact", ["valid_windows", "ignore_regions"])
def test_what_targets_have_is_described(subject, fact, lang):
    module = made(subject)
    assert methods.describe(module, lang=lang) != methods.describe(module, lang=lang, **{fact: True})


def changes_of(settings):
    """Settings with one field changed, for every field however deep."""
    other = {
        "count": 77, "area": 8, "layout": "stratified", "padding_mode": "border", "target_mode": "nearest",
        "focal_gamma": 1.0, "kind": "focal", "num_classes": 7, "class_weights": (0.5, 2.0), "normalized": "device",
        "classification": "focal", "divisor": "targets", "valid_windows": True, "ignore_regions": True, "groups": 13,
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


# Fields that say nothing by themselves: the area counts where there is no number of points, alpha only beside gamma or
# in other classifications, and the matcher's points are all uniform.
SILENT = {
    "points.area", "matching.points.area", "matching.points.oversample_ratio", "matching.points.importance_ratio",
    "classification.focal_alpha",
}  # fmt: skip


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_field_of_the_settings_is_heard(lang):
    settings = settings_of(MaskCriterion(80))
    before = methods.describe(settings, lang=lang)
    changed = dict(changes_of(settings))
    assert len(changed) > 25
    assert {name for name, each in changed.items() if methods.describe(each, lang=lang) == before} == SILENT


def test_the_paragraph_of_the_defaults_says_what_a_methods_section_needs_in_150_words():
    text, *formulas = methods.describe(MaskCriterion(num_classes=80)).split("\n\n")
    assert len(text.split()) <= 150
    for part in (
        "PointRend", "Mask2Former", "P = 12,544", "9,408 (75\xa0%)", "3P = 37,632", "U(z) = −|z|", "3,136 (25\xa0%)",
        "bilinearly, each at its own resolution", "Binary cross-entropy", "Dice", "λ_ce = 5", "λ_dice = 5",
        "divided by N, the number of matched instances in the batch over all devices",
        "−2 p(c) + 5 BCE + 5 Dice", "80 classes", "no object", "0.1",
    ):  # fmt: skip
        assert part in text, part
    assert formulas[0].strip().startswith("L_ce = ") and formulas[1].strip().startswith("L_dice = ")


def test_the_chinese_paragraph_has_the_terms_of_the_field():
    text = methods.describe(MaskCriterion(num_classes=80), lang="zh").split("\n\n")[0]
    for term in (
        "点采样",
        "掩码",
        "不确定性",
        "二元交叉熵",
        "二部图匹配",
        "匈牙利算法",
        "双线性插值",
        "12,544",
        "9,408",
        "75%",
    ):
        assert term in text, term
    assert not re.search(r"[,.;:] ?[\u4e00-\u9fff]", text), "punctuation between Chinese words is full-width"
    assert not re.search(r"[\u4e00-\u9fff][A-Za-z]|[A-Za-z][\u4e00-\u9fff]", text), "Latin words stand apart"


@pytest.mark.parametrize("lang", LANGUAGES)
def test_plain_text_holds_no_markup(lang):
    focal = MaskCriterion(80, focal_alpha=0.25, focal_gamma=2.0, sampling=PointSampling(4001, 1.7, 0.3))
    for module in (MaskCriterion(80), MaskLoss(), HungarianMatcher(classification="focal"), focal):
        assert not set(methods.describe(module, lang=lang, ignore_regions=True)) & set("\\{}$~`")


def test_counts_are_those_of_the_sampling():
    sampling = PointSampling(num_points=1001, oversample_ratio=1.7, importance_ratio=0.3)
    text = methods.describe(MaskLoss(sampling=sampling))
    for count in (sampling.num_points, sampling.num_candidates, sampling.num_uncertain, sampling.num_random):
        assert f"{count:,}" in text
    assert "⌊1.7P⌋ = 1,701" in text


@pytest.mark.parametrize(
    ("module", "cited"),
    [
        (MaskLoss(), ["kirillov2020pointrend", "cheng2022mask2former", "milletari2016vnet"]),
        (MaskLoss(sampling=PointSampling(importance_ratio=0)), ["cheng2022mask2former", "milletari2016vnet"]),
        (
            MaskLoss(focal_gamma=2.0),
            ["kirillov2020pointrend", "cheng2022mask2former", "lin2017focal", "milletari2016vnet"],
        ),
        (HungarianMatcher(), ["carion2020detr", "kuhn1955hungarian"]),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"steps": 3}', "unknown: steps"),
        ("[1]", "holds list"),
        ("{", "must be JSON"),
        ('{"sampling": 5}', "sampling must be a mapping"),
        ('{"num_points": 0}', "num_points must be an integer, at least 1"),
        ('{"matcher": {"color": 1}}', "unknown: color"),
    ],
)
def test_files_that_do_not_work(capsys, tmp_path, content, message):
    path = tmp_path / "options.json"
    path.write_text(content)
    assert message in refused(capsys, "--config", path)


def test_input_that_does_not_work(capsys, tmp_path):
    assert "must be readable" in refused(capsys, "--config", tmp_path / "none.json")
    assert "settings must come from one place" in refused(capsys, tmp_path, "--config", tmp_path)
    assert "has no run.json" in refused(capsys, tmp_path)
    assert "say themselves what their settings are" in refused(capsys, tmp_path, "--num-points", 5)
    assert "--standalone prints" in refused(capsys, "--standalone", "--format", "text")


def test_a_training_run(capsys, tmp_path):
    from maskloss.lab.config import TrainConfig
    from maskloss.lab.loop.progress import Listener
    from maskloss.lab.loop.run import train

    config = TrainConfig(steps=2, batch_size=2, held_out=4, evaluations=1, num_points=32, workers=0)
    train(config, tmp_path / "run", Listener.silent())
    out = printed(capsys, tmp_path / "run")
    assert "P = 32" in out and "10 classes" in out and "weighted 10" in out


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
        "24 (25\xa0%)",
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
    assert "it is bert" in refused(capsys, "--model", tmp_path)
    assert "must have a configuration" in refused(capsys, "--model", tmp_path / "nowhere")


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
        term=MaskTerm(),
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
