"""The package as its users get it: what an import costs, what is shipped, whether the pages are true."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import maskloss

ROOT = Path(__file__).resolve().parent.parent
# The blocks of Chinese pages are those of the English ones: see test_translations.py.
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("**/*.md")) if page.parent.name != "zh"),
]
PACKAGE = Path(maskloss.__file__).parent
PUBLIC_MODULES = ["maskloss"] + [
    f"maskloss.{path.stem}"
    for path in sorted(PACKAGE.glob("[a-z]*"))
    if (path.suffix == ".py" or path.joinpath("__init__.py").exists()) and path.stem != "ops"
]


def python(*args: str, cwd: Path, **environment: str) -> str:
    """Run a fresh interpreter away from the repository and return what it prints."""
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light(tmp_path: Path) -> None:
    """What a first step needs is imported by the first step: of our own modules few, of others nearly none."""
    heavy = {"numba", "llvmlite", "triton", "transformers", "matplotlib", "sklearn", "pycocotools", "PIL", "rich"}
    late = {"scipy.ndimage", "scipy.optimize", "numpy.typing", "torch._dynamo"}
    code = """
import sys, torch
before = set(sys.modules)
import maskloss
print(torch.cuda.is_initialized(), *set(sys.modules) - before)
"""
    initialized, *names = python("-c", code, cwd=tmp_path).split()
    assert initialized == "False", "importing maskloss must not initialize CUDA"
    loaded = set(names)
    own = {name for name in loaded if name.partition(".")[0] == "maskloss"}
    assert not heavy & {name.partition(".")[0] for name in loaded}
    assert not late & loaded
    assert not {name for name in own if name.startswith(("maskloss.lab", "maskloss.integrations", "maskloss.ops.cpu"))}
    assert len(own) <= 48, sorted(own)
    assert len(loaded - own) <= 20, sorted(loaded - own)


def test_version_is_the_installed_one() -> None:
    assert maskloss.__version__ == importlib.metadata.version("maskloss")
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert maskloss.__version__ in changes
    assert f"version: {maskloss.__version__}" in (ROOT / "CITATION.cff").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    python("-m", "hatchling", "build", "-t", "wheel", "-d", str(out), cwd=ROOT)
    [built] = out.glob("*.whl")
    return built


def test_wheel_ships_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [info] = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert "maskloss/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    assert {name.partition("/")[0] for name in names} == {"maskloss", info}
    assert not [name for name in names if name.endswith((".pyc", ".nbi", ".nbc"))]
    assert "maskloss = maskloss.lab.cli:main" in scripts
    assert re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE) == [
        "numba",
        "numpy",
        "scipy",
        "torch",
        "typing-extensions",
    ]


@pytest.mark.slow
def test_links_of_the_package_index_lead_somewhere(wheel: Path) -> None:
    """In the repository they are relative; an index knows no files beside the README."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        text = archive.read(name).decode()
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    assert len(links) > 30
    assert all((link or source).startswith("https://") for link, source in links)
    assert "raw.githubusercontent.com/maskloss/maskloss/main/docs/images/training_run.png" in text
    assert "github.com/maskloss/maskloss/blob/main/docs/install.md#extras" in text


def test_wheel_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    python(
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
        cwd=tmp_path,
    )
    code = """
import pathlib, sys, torch, maskloss
assert pathlib.Path(maskloss.__file__).is_relative_to(sys.argv[1]), maskloss.__file__
logits = torch.randn(3, 16, 16, requires_grad=True)
out = maskloss.MaskLoss()(logits, torch.rand(3, 64, 64) > 0.5, seed=0)
out.total.backward()
print(float(out.total), float(logits.grad.abs().sum()))
from maskloss.lab.cli import main
sys.argv = ["maskloss", "--help"]
sys.exit(main())
"""
    total, gradient, *told = python("-c", code, str(site), cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert float(total) > 0
    assert float(gradient) > 0
    assert "train" in told


def test_the_command_is_installed(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("maskloss")
    if not script.exists():
        pytest.skip("the package is on the path but not installed")
    done = subprocess.run([script, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert maskloss.__version__ in done.stdout


def test_command_line_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    from maskloss.lab.cli import main

    def shown(*args: str) -> str:
        with pytest.raises(SystemExit, match=r"^0$"):
            main(args)
        return capsys.readouterr().out

    text = shown("--help")
    commands = [path.stem for path in (PACKAGE / "lab" / "commands").glob("[a-z]*.py")]
    assert "train" in commands
    for command in commands:
        assert command in text
        assert f"usage: maskloss {command}" in shown(command, "--help")


# -------------------------------------------------------------------------------------- documentation is true


def fences(page: Path) -> list[tuple[int, str, str]]:
    """List a page's blocks: line, language, text. A block after `<!-- not run: why -->` is left out."""
    pattern = re.compile(r"^(<!-- not run: .+ -->\n+)?```(python|pycon)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start(2)) + 1, match[2], match[3])
        for match in pattern.finditer(text)
        if not match[1]
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_in_documentation_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page's blocks in order, in one namespace: a later block may use what an earlier one defined."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for line, language, code in fences(page):
        if language == "python":
            # Empty lines first, so that a traceback names the line of the page.
            exec(compile("\n" * line + code, str(page), "exec"), names)
        else:
            example = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
            report: list[str] = []
            assert not runner.run(example, out=report.append, clear_globs=False).failed, "".join(report)
            names.update(example.globs)


def public_objects() -> dict[str, Any]:
    """Everything that a public module lists in `__all__`, and the calls of its classes that take user input."""
    found: dict[str, Any] = {}
    for module in map(importlib.import_module, PUBLIC_MODULES):
        for name in getattr(module, "__all__", []):
            thing = getattr(module, name)
            if inspect.ismodule(thing):
                continue
            found[f"{module.__name__}.{name}"] = thing
            if inspect.isclass(thing):
                members = {key: value for key, value in vars(thing).items() if not key.startswith("_")}
                for key, value in members.items():
                    if isinstance(value, staticmethod | classmethod) or key == "forward":
                        found[f"{module.__name__}.{name}.{key}"] = getattr(thing, key)
    return found


@pytest.mark.parametrize("name", public_objects())
def test_public_names_are_documented(name: str) -> None:
    thing = public_objects()[name]
    text = inspect.getdoc(thing)
    assert text, f"{name} has no docstring"
    if isinstance(thing, type):
        for key, value in vars(thing).items():
            if not key.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert inspect.getdoc(value), f"{name}.{key} has no docstring"
        if issubclass(thing, BaseException):
            return
    elif not callable(thing):
        return
    signature = inspect.signature(thing)
    takes = [parameter for parameter in signature.parameters if parameter not in {"self", "cls"}]
    if takes:
        assert re.search(r"^(Args|Attributes):", text, re.MULTILINE), f"{name} does not document its arguments"
    for parameter in takes:
        assert re.search(rf"^ +{parameter}\b.*:", text, re.MULTILINE), f"{name} does not document {parameter}"
    if takes and not isinstance(thing, type) and signature.return_annotation not in {None, "None"}:
        assert re.search(r"^(Returns|Yields):", text, re.MULTILINE), f"{name} does not say what it returns"


@pytest.mark.parametrize("module", [maskloss, maskloss.functional])
def test_public_names_have_a_place_in_the_reference(module: ModuleType) -> None:
    listed = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    for name in module.__all__:
        assert inspect.ismodule(getattr(module, name)) or re.search(rf"^.. auto.*\b{name}$", listed, re.MULTILINE), name
