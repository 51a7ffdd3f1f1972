"""What a release rests on: the tag's check, pinned actions, and hooks that are those of `make check`."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import maskloss

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / "scripts" / "release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def repository(root: Path, version: str, changes: str) -> Path:
    (root / "src" / "maskloss").mkdir(parents=True)
    (root / "src" / "maskloss" / "__init__.py").write_text(f'"""Text."""\n\n__version__ = "{version}"\n')
    (root / "CHANGELOG.md").write_text(f"# Changelog\n\n## [{changes}] - 2026-12-01\n")
    (root / "CITATION.cff").write_text(f"title: x\nversion: {version}\n")
    return root


@pytest.mark.parametrize("tag", ["v1.2.3", "v1.2.3rc1"])
def test_a_tag_that_fits(release: ModuleType, tmp_path: Path, tag: str) -> None:
    assert release.problems(tag, repository(tmp_path, tag[1:], tag[1:])) == []


@pytest.mark.parametrize(
    ("tag", "named"),
    [
        ("v1.2.4", ["__init__.py", "CHANGELOG.md", "CITATION.cff"]),
        ("v1.2", ["a tag looks like", "__init__.py", "CHANGELOG.md", "CITATION.cff"]),
        ("1.2.3", ["a tag looks like"]),
    ],
)
def test_a_tag_that_does_not_fit(release: ModuleType, tmp_path: Path, tag: str, named: list[str]) -> None:
    found = release.problems(tag, repository(tmp_path, "1.2.3", "1.2.3"))
    assert len(found) == len(named)
    assert all(name in problem for name, problem in zip(named, found, strict=True))


def test_unreleased_changes_are_no_release(release: ModuleType, tmp_path: Path) -> None:
    assert "CHANGELOG.md" in str(release.problems("v1.2.3", repository(tmp_path, "1.2.3", "Unreleased")))


def test_names_of_files_are_those_of_this_repository(release: ModuleType) -> None:
    """The package and the citation agree all the time; the changelog only once there is a release."""
    assert [each for each in release.problems(f"v{maskloss.__version__}") if not each.startswith("CHANGELOG.md")] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_rights_are_few(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {}
    rights = {}
    for name, job in workflow["jobs"].items():
        rights[name] = job["permissions"]
        for step in job["steps"]:
            assert re.search(r"@[0-9a-f]{40}$", step.get("uses", "@" + "0" * 40)), step
            assert "secrets" not in str(step) and "${{" not in step.get("run", "")
    wanted = {name: {"contents": "read"} for name in rights}
    assert rights == wanted | ({"publish": {"id-token": "write"}} if "publish" in rights else {})


def test_hooks_are_the_checks_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text()
    [recipe] = re.findall(r"^check: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    checks = [re.split(r"&& ", line)[1] for line in recipe.splitlines()]
    in_make = [line.replace("$(VENV)", ".venv").replace("$(PY)", ".venv/bin/python") for line in checks]
    [hooks] = [repo["hooks"] for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]]
    # A hook gets the names of files, and mends what it finds.
    mended = [hook["entry"].replace(" --force-exclude", "") for hook in hooks]
    in_hooks = [entry.replace(" --fix --show-fixes", "") for entry in mended]
    assert [re.sub(r"(ruff format) --check \.|(ruff check) \.", r"\1\2", line).strip() for line in in_make] == in_hooks


def test_issue_forms_ask_for_the_doctor() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    [asked] = [field for field in form["body"] if field.get("id") == "doctor"]
    assert "maskloss doctor" in asked["attributes"]["label"]
    assert asked["validations"]["required"] is True
