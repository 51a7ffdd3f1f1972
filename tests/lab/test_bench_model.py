"""The benchmark of whole models: what it checks, what it measures, what it prints."""

from __future__ import annotations

import argparse
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

pytest.importorskip("psutil")
pytest.importorskip("transformers")

from maskloss.integrations.transformers import factors
from maskloss.lab.bench import model, runner
from maskloss.lab.bench.model import MODEL_ARMS, MODELS, ModelCase, model_lines, model_table
from maskloss.lab.bench.model_worker import ModelWorker
from maskloss.lab.bench.runner import Settings, run_case
from maskloss.lab.commands import bench as bench_command

SETTINGS = Settings(MODEL_ARMS, steps=3, seconds=10, threads=2, device="cpu", dtype="float32")
POINTS = {"num_queries": 12, "train_num_points": 128, "num_attention_heads": 2}
BACKBONE = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "drop_path_rate": 0.0}
WIDTHS = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
DEPTHS = {"encoder_layers": 1, "decoder_layers": 3, "dim_feedforward": 16}
SMALL = {
    "mask2former": {**POINTS, **WIDTHS, **DEPTHS, "backbone": BACKBONE},
    "eomt": {**POINTS, "hidden_size": 32, "num_hidden_layers": 3, "num_blocks": 2},
}


def small(name: str) -> ModelCase:
    return replace(MODELS[name], image=64, targets=3, config=SMALL[name])


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


@pytest.mark.parametrize("name", MODELS)
def test_cases_survive_json(name: str) -> None:
    again = ModelCase.from_dict(json.loads(json.dumps(MODELS[name].as_dict())))
    assert again == MODELS[name]
    assert "2 images of 512 px, 20 targets each, random weights" in again.describe()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("threads")
def test_all_arms_compute_the_same(name: str) -> None:
    checks = ModelWorker().check(small(name).as_dict(), ["patched", "factors"], "cpu", "float32", 0)["checks"]
    assert [check["other"] for check in checks] == ["patched", "factors"]
    for check in checks:
        assert check["passed"]
        assert check["loss"] < 1e-5
        assert check["gradient"] < 1e-3
        assert check["attention"] > 0


@pytest.mark.usefixtures("threads")
def test_a_wrong_arm_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention masks from the wrong sign: the loss is finite, and another one."""
    inner = factors.LayerFactors.resize
    monkeypatch.setattr(factors.LayerFactors, "resize", lambda self, **options: -inner(self, **options))
    patched, factored = ModelWorker().check(
        small("mask2former").as_dict(), ["patched", "factors"], "cpu", "float32", 0
    )["checks"]
    assert patched["passed"]
    assert not factored["passed"]
    assert factored["flips"] > 0


@pytest.mark.slow
def test_arms_are_measured_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench_command, "MODELS", {"eomt": small("eomt"), "mask2former": small("mask2former")})
    parser = argparse.ArgumentParser()
    bench_command.add_arguments(parser)
    given = parser.parse_args(["--model", "eomt", "--quick", "--threads", "2", "--out", str(tmp_path)])
    assert bench_command.main(given) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["cases"] == []
    [found] = report["models"]
    assert list(found["arms"]) == list(MODEL_ARMS)
    for results in found["arms"].values():
        assert [sample["round"] for sample in results["samples"]] == [0, 1, 2]
        assert results["memory"]["peak"] is None or results["memory"]["peak"] >= 0
        step = results["summary"]["step"]
        assert step["low"] <= step["median"] <= step["high"]
    # Patched with and without factors draw the same points; the unpatched model draws its own.
    losses = {arm: [sample["loss"] for sample in found["arms"][arm]["samples"]] for arm in MODEL_ARMS}
    assert losses["patched"] == pytest.approx(losses["factors"], rel=1e-5)
    assert losses["patched"] != losses["unpatched"]
    text = capsys.readouterr().out
    assert "EoMT with ViT-S, 2 images of 64 px" in text
    assert "attention logits on the other side of 0" in " ".join(text.split())


def test_nothing_is_timed_behind_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    differs = {"loss": 1.0, "gradient": 1.0, "flips": 0, "attention": 1}
    names = {"patched": True, "factors": False}
    checks = [{"other": each, "base": "the unpatched model", "passed": names[each], **differs} for each in names]
    process = MagicMock()
    ask = process.return_value.__enter__.return_value.ask
    ask.return_value = {"digest": "", "checks": checks}
    monkeypatch.setattr(runner, "Process", process)
    report = run_case(small("eomt"), SETTINGS, lambda _: None)
    assert [asked.args for asked in ask.call_args_list] == [("check",)]
    assert report["failed"] == "the unpatched model and factors do not agree; nothing was timed"
    assert report["arms"] == {}
    assert any("loss within 1.0e+00" in line for line in model_lines(report))


def test_a_table_shows_failures_and_gaps() -> None:
    console = pytest.importorskip("rich.console").Console(width=120, file=io.StringIO())
    spread = {"low": 1.0, "median": 2.0, "high": 3.0}
    summary = {"forward": spread, "backward": spread, "step": {**spread, "median": 4.0}}
    half = {**summary, "step": {**spread, "median": 2.0}}
    report = {
        "name": "eomt",
        "sizes": MODELS["eomt"].as_dict(),
        "arms": {
            "unpatched": {"summary": summary, "memory": {"peak": 5e8}},
            "patched": {"summary": half, "memory": {"peak": None}},
            "factors": {"failed": "out of memory", "samples": []},
        },
    }
    console.print(model_table(report))
    text = console.file.getvalue()
    assert "500 MB" in text
    assert re.search(r"patched +2\.00 s .* not measured +2\.00", text)
    assert re.search(r"factors +failed", text)


def test_models_are_measured_in_float32() -> None:
    with pytest.raises(ValueError, match="models are measured in float32, not in bfloat16"):
        ModelWorker().setup(small("eomt").as_dict(), "patched", "cpu", "bfloat16", 0)


@pytest.mark.parametrize("name", MODELS)
def test_the_published_models_are_what_they_are_called(name: str) -> None:
    """Sizes without building them: 47 million parameters of Mask2Former with Swin-T, 24 of EoMT with ViT-S."""
    with torch.device("meta"):
        made = model.build(MODELS[name], 0)
    millions = sum(parameter.numel() for parameter in made.parameters()) / 1e6
    assert millions == pytest.approx({"mask2former": 47.4, "eomt": 24.0}[name], rel=0.05)
    assert made.training
