"""`maskloss methods`: which settings to describe, and how to print them."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskloss.errors import Cause
from maskloss.lab import files
from maskloss.lab.terminal import printable
from maskloss.methods import FORMATS, FORMULAS, LANGUAGES, STYLES, MethodSettings, bibtex, describe, document
from maskloss.methods.settings import Augmentation, Training, settings_of
from maskloss.methods.sources import (
    GROUPS,
    SUBJECTS,
    TARGETS,
    matcher_options,
    option_names,
    settings_from,
    settings_of_config,
    settings_of_model,
)

LESS_MEMORY = "close other programs"
DESCRIPTION = (
    "Write the paragraphs that describe the loss in a paper, with equations and references, from the defaults, a "
    "training run, a file of options, or the configuration of a Transformers model."
)
_RULE = "--config must be a JSON or YAML file with options by name"
# Options of a run that the text takes as they are.
_AS_THEY_ARE = (
    "crop", "batch_size", "weight_decay", "clip", "schedule", "warmup", "precision", "layer_decay",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `maskloss methods`."""
    parser.description = DESCRIPTION
    parser.add_argument("run_folder", nargs="?", type=Path, metavar="RUN", help="folder of a run of maskloss train")
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON or YAML file with options by name")
    parser.add_argument("--model", metavar="NAME", help="Transformers model: a folder, or a name on the Hub")
    parser.add_argument(
        "--subject", choices=SUBJECTS, default="criterion", help="what to describe; default: the whole criterion"
    )
    parser.add_argument("--lang", choices=LANGUAGES, default="en", help="language; default: en")
    parser.add_argument("--format", choices=FORMATS, help="default: text")
    parser.add_argument("--style", choices=STYLES, default="full", help="short: one paragraph of about 80 words")
    parser.add_argument(
        "--formulas",
        choices=FORMULAS,
        help="equations to print; default: those of the loss for the full style, none for the short one",
    )
    parser.add_argument("--standalone", action="store_true", help="print a LaTeX document that compiles as it is")
    parser.add_argument("--bib", type=Path, metavar="FILE", help="write the BibTeX entries there; default: print them")
    facts = parser.add_argument_group("facts about the targets")
    facts.add_argument("--valid-windows", action="store_true", help="points are drawn inside the images only")
    facts.add_argument("--ignore-regions", action="store_true", help="points in ignore regions weigh nothing")
    single = parser.add_argument_group("single options, by the names of the constructors")
    for name, default in _options().items():
        shown = "" if default is None else f"default: {default}"
        flag = f"--{name.replace('_', '-')}"
        single.add_argument(flag, dest=f"option.{name}", type=_value, metavar="VALUE", help=shown)


def main(options: argparse.Namespace) -> int:
    """Print the text."""
    settings = _settings(options).with_targets(options.valid_windows, options.ignore_regions)
    chosen = {"lang": options.lang, "style": options.style, "formulas": options.formulas}
    if options.standalone:
        if options.format not in {None, "latex"} or options.bib is not None:
            raise Cause(
                "--standalone prints a LaTeX document with its references",
                "--format or --bib asks for something else",
                "leave it out",
            )
        _print(document(settings, **chosen).rstrip("\n"))
        return 0
    form = options.format or "text"
    text, entries = describe(settings, format=form, **chosen), bibtex(settings, **chosen)
    if options.bib is not None:
        files.check_writable(options.bib, "--bib")
        files.write_text(options.bib, entries + "\n")
    _print(text)
    if options.bib is not None:
        return 0
    if form == "markdown":
        _print(f"\n```bibtex\n{entries}\n```")
    elif form == "latex":
        # As a comment: the output can be read with \input as it is.
        _print("\n" + "\n".join(f"% {line}".rstrip() for line in entries.splitlines()))
    else:
        _print(f"\n{entries}")
    return 0


def _print(text: str) -> None:
    """Print text line by line; what names of models and classes hold must not reach a terminal as it is."""
    print("\n".join(printable(line) for line in text.split("\n")))


def settings_of_run(folder: Path) -> MethodSettings:
    """Read the settings of a training run from the folder that it wrote."""
    import torch

    from maskloss.lab.config import BEST, COMPACT
    from maskloss.lab.data import augment
    from maskloss.lab.models.learners import count_weights
    from maskloss.lab.models.pretrained import PretrainedLearner
    from maskloss.lab.models.registry import load_learner
    from maskloss.lab.runfolder import SUMMARY, kept_step, read_facts

    facts = read_facts(folder)
    config = facts.config
    summary = folder / SUMMARY
    ended = files.read_json(summary, "a summary must be that of a run") if summary.is_file() else {}
    steps = int(ended.get("steps", config.num_steps))
    learner = load_learner(folder, facts, torch.device("cpu"))
    model, pretrained, share = None, None, 1.0
    if config.model != COMPACT:
        # The path of a folder says nothing to a reader; names on the Hub have a slash, too.
        path = Path(config.model)
        pretrained = path.name if path.is_absolute() or path.exists() else config.model
    if not isinstance(learner, PretrainedLearner):
        found = settings_of(learner.mask_criterion())
    else:
        model = re.sub("For(Universal|Instance)Segmentation$", "", type(learner.network).__name__)
        share = learner.backbone_share
        found = settings_of_config(learner.network.config)
        # A run says itself how points lie to each other; a configuration of Transformers knows one way only.
        assert found.points is not None and found.matching is not None
        points: dict[str, Any] = {"count": learner.num_points, "area": None, "layout": config.layout}
        matching = replace(found.matching, points=replace(found.matching.points, **points))
        found = replace(found, points=replace(found.points, **points), matching=matching)
        if facts.class_weights is not None and found.classification is not None:
            weighed = replace(found.classification, class_weights=tuple(facts.class_weights))
            found = replace(found, classification=weighed)
    folder_of_images = config.data is not None
    training = Training(
        model=model,
        pretrained=pretrained,
        queries=learner.num_queries,
        parameters=count_weights(learner),
        size=config.size or 0,
        augmentation=Augmentation(augment.SMALLEST, augment.LARGEST, facts.one_class_maps) if config.augment else None,
        digits=not folder_of_images,
        steps=steps,
        lr=config.lr or 0.0,
        backbone_share=share,
        planned=None if steps == config.num_steps else config.num_steps,
        ema_decay=config.ema_decay if config.ema else None,
        best=ended.get("kept_step", kept_step(folder, config)) if config.keep == BEST else None,
        **{name: getattr(config, name) for name in _AS_THEY_ARE},
    )
    version = facts.version if re.fullmatch(r"[\w.+-]{1,40}", facts.version or "") else None
    return replace(found, training=training, version=version).with_targets(folder_of_images, folder_of_images)


def _options() -> dict[str, Any]:
    """List every option that can be set alone: those of each subject, and the matcher's."""
    listed = {name: default for subject in SUBJECTS for name, default in option_names(subject).items()}
    listed |= {f"matcher_{name}": None for name in matcher_options()}
    return {name: default for name, default in listed.items() if name not in TARGETS}


def _settings(options: argparse.Namespace) -> MethodSettings:
    given: dict[str, Any] = {
        name.removeprefix("option."): value
        for name, value in vars(options).items()
        if name.startswith("option.") and value is not None
    }
    sources = [name for name in ("run_folder", "config", "model") if getattr(options, name) is not None]
    if len(sources) > 1:
        raise Cause(
            "settings must come from one place", f"given: {', '.join(sources)}", "name a run, a file or a model"
        )
    if options.run_folder is not None or options.model is not None:
        if given or options.subject != "criterion":
            raise Cause(
                "a run and a model say themselves what their settings are",
                f"given as well: {', '.join([*given] or ['subject'])}",
                "use single options with --config, or alone",
            )
        return settings_of_run(options.run_folder) if options.model is None else settings_of_model(options.model)
    own = {name.removeprefix("matcher_"): given.pop(name) for name in [*given] if name.startswith("matcher_")}
    content = files.read_mapping(options.config, _RULE, "methods") if options.config is not None else {}
    # Single options win over the file's.
    for name, values in (*dict.fromkeys(GROUPS, given).items(), ("matcher", own)):
        if isinstance(content.get(name), dict):
            content[name] = {key: value for key, value in content[name].items() if key not in values}
    if own and isinstance(content.setdefault("matcher", {}), dict):
        content["matcher"] |= own
    return settings_from({**content, **given}, options.subject)


def _value(text: str) -> Any:
    """Read a number, numbers separated by commas, or a word; nonsense stays text, and is rejected as such."""
    try:
        if "," in text:
            return [float(part) for part in text.split(",")]
        return int(text) if re.fullmatch(r"-?[0-9]{1,20}", text) else float(text)
    except ValueError:
        return text
