"""`maskloss methods`: which settings to describe, and how to print them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from maskloss.errors import Cause
from maskloss.lab.files import write_whole
from maskloss.methods import FORMATS, LANGUAGES, MethodSettings, bibtex, describe, document
from maskloss.methods.settings import settings_of
from maskloss.methods.sources import (
    SUBJECTS,
    TARGETS,
    matcher_options,
    option_names,
    options_of_file,
    settings_from,
    settings_of_model,
    settings_of_options,
)

LESS_MEMORY = "close other programs"
DESCRIPTION = (
    "Write the paragraph that describes the loss in a paper, with its formulas and references, from the defaults, a "
    "training run, a file of options, or the configuration of a Transformers model."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `maskloss methods`."""
    parser.description = DESCRIPTION
    parser.add_argument("run_folder", nargs="?", type=Path, metavar="RUN", help="folder of a run of maskloss train")
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON or YAML file with options by name")
    parser.add_argument("--model", metavar="…", help="Transformers model: a folder, or a name on the Hub")
    parser.add_argument(
        "--subject", choices=SUBJECTS, default="criterion", help="what to describe; default: the whole criterion"
    )
    parser.add_argument("--lang", choices=LANGUAGES, default="en", help="language; default: en")
    parser.add_argument("--format", choices=FORMATS, help="default: text")
    parser.add_argument("--standalone", action="store_true", help="print a LaTeX document that compiles as it is")
    parser.add_argument("--bib", type=Path, metavar="FILE", help="write the BibTeX entries there; default: print them")
    facts = parser.add_argument_group("facts about the targets")
    facts.add_argument("--valid-windows", action="store_true", help="points are drawn inside the images only")
    facts.add_argument("--ignore-regions", action="store_true", help="points in ignore regions weigh nothing")
    single = parser.add_argument_group("single options, by the names of the constructors")
    for name, default in _options().items():
        shown = "" if default is None else f"default: {default}"
        single.add_argument(f"--{name.replace('_', '-')}", dest=f"option.{name}", type=_value, metavar="…", help=shown)


def main(options: argparse.Namespace) -> int:
    """Print the paragraph."""
    settings = _settings(options).with_targets(options.valid_windows, options.ignore_regions)
    if options.standalone:
        if options.format not in {None, "latex"} or options.bib is not None:
            raise Cause(
                "--standalone prints a LaTeX document with its references",
                "--format or --bib asks for something else",
                "leave it out",
            )
        print(document(settings, lang=options.lang), end="")
        return 0
    form = options.format or "text"
    print(describe(settings, lang=options.lang, format=form))
    entries = bibtex(settings)
    if options.bib is not None:
        write_whole(options.bib, lambda partial: partial.write_text(entries + "\n", encoding="utf-8"))
    elif form == "markdown":
        print(f"\n```bibtex\n{entries}\n```")
    elif form == "latex":
        # As a comment: the output can be read with \input as it is.
        print("\n" + "\n".join(f"% {line}".rstrip() for line in entries.splitlines()))
    else:
        print(f"\n{entries}")
    return 0


def settings_of_run(folder: Path) -> MethodSettings:
    """Read the settings of a training run from the folder that it wrote.

    Raises:
        MaskLossError: a folder without the configuration of a run.
        MissingExtraError: a package of the extra `train` is not installed.
    """
    import torch

    from maskloss.integrations.transformers.options import method_options
    from maskloss.lab.config import COMPACT
    from maskloss.lab.loop.run import load_learner
    from maskloss.lab.loop.runfolder import read_facts

    facts = read_facts(folder)
    learner: Any = load_learner(folder, facts, torch.device("cpu"))
    padded = facts.config.data is not None
    if facts.config.model == COMPACT:
        found = settings_of(learner.criterion)
    else:
        found = settings_of_options(method_options(learner.network.config))
    return found.with_targets(padded, padded)


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
                "single options go with --config, or alone",
            )
        return settings_of_run(options.run_folder) if options.model is None else settings_of_model(options.model)
    own = {name.removeprefix("matcher_"): given.pop(name) for name in [*given] if name.startswith("matcher_")}
    content = options_of_file(options.config) if options.config is not None else {}
    # Single options win over the file's.
    for name, values in (("sampling", given), ("matcher", own)):
        if isinstance(content.get(name), dict):
            content[name] = {key: value for key, value in content[name].items() if key not in values}
    if own:
        content["matcher"] = {**content.get("matcher", {}), **own}
    return settings_from({**content, **given}, options.subject)


def _value(text: str) -> Any:
    """Read a number, numbers separated by commas, or a word."""
    if "," in text:
        return [float(part) for part in text.split(",")]
    number = text.removeprefix("-")
    if number.isdigit():
        return int(text)
    return float(text) if re.fullmatch(r"[0-9.]+(e[+-]?[0-9]+)?", number) else text
