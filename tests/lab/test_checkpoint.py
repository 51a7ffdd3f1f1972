"""Checkpoints: whole or not there, and refused with a reason where they are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from maskloss import MaskLossError
from maskloss.lab import files
from maskloss.lab.config import TrainConfig
from maskloss.lab.loop import checkpoint
from maskloss.lab.loop.average import Average
from maskloss.lab.loop.checkpoint import Position
from maskloss.lab.runfolder import kept_step, path_of, steps_of


def model_and_optimizer():
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(
        [{"params": [network[0].weight], "weight_decay": 0.5}, {"params": [network[2].weight]}],
        lr=0.1,
        betas=(0.9, 0.99),
    )
    return network, optimizer


def train_a_little(network, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()


def position(step):
    return Position(step, 1.5, {"data": 0.25}, {}, [[0.1, 2.0]], ["total", "loss"], 1)


@pytest.fixture
def written(tmp_path):
    network, optimizer = model_and_optimizer()
    train_a_little(network, optimizer, 3)
    checkpoint.write(tmp_path, position(3), network, optimizer)
    return tmp_path, network, optimizer


def test_training_goes_on_as_if_nothing_had_happened(written):
    folder, network, optimizer = written
    train_a_little(network, optimizer, 4)
    other, its_optimizer = model_and_optimizer()
    torch.manual_seed(99)
    assert checkpoint.read(folder, 3, other, its_optimizer) == position(3)
    train_a_little(other, its_optimizer, 4)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert its_optimizer.param_groups[0]["betas"] == (0.9, 0.99)


def test_only_the_last_two_are_kept(written):
    folder, network, optimizer = written
    for step in (5, 7):
        checkpoint.write(folder, position(step), network, optimizer)
    assert steps_of(folder) == [5, 7]
    assert steps_of(folder / "nowhere") == []


def test_an_average_of_the_weights():
    """average <- d average + (1 - d) weights with d = min(decay, (1 + n) / (10 + n)), buffers too."""
    network, optimizer = model_and_optimizer()
    average = Average(network, 0.3)
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (3, 0.3)):
        train_a_little(network, optimizer, 1)
        average.update(step)
        for name, tensor in network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor if tensor.is_floating_point() else tensor
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with average.shown():
        for name, tensor in network.state_dict().items():
            torch.testing.assert_close(tensor, expected[name])
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_the_average_of_tied_weights():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    average = Average(network, 0.5)
    before = network[0].weight.detach().clone()
    with torch.no_grad():
        network[0].weight += 1
    with average.shown():
        assert torch.equal(network[1].weight, before) and network[0].weight is network[1].weight


def test_an_average_goes_on_as_if_nothing_had_happened(tmp_path):
    network, optimizer = model_and_optimizer()
    average = Average(network, 0.9)
    train_a_little(network, optimizer, 2)
    average.update(2)
    checkpoint.write(tmp_path, position(2), network, optimizer, average)
    other, its_optimizer = model_and_optimizer()
    restored = Average(other, 0.9)
    checkpoint.read(tmp_path, 2, other, its_optimizer, restored)
    with average.shown(), restored.shown():
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
    assert not torch.equal(network[0].weight, restored._held[0]) and torch.equal(network[0].weight, other[0].weight)
    (path_of(tmp_path, 2) / "average.safetensors").unlink()
    with pytest.raises(MaskLossError, match=r"there is no average\.safetensors"):
        checkpoint.read(tmp_path, 2, other, its_optimizer, restored)


def test_the_best_is_kept_beside_the_last_two(tmp_path):
    network, optimizer = model_and_optimizer()
    for step, ap in ((1, 0.1), (2, 0.7), (3, 0.2), (4, None), (5, 0.8), (6, 0.3), (7, 0.1)):
        line = {"step": step, "held_out": {"ap": ap, "ap50": ap, "mean_iou": ap}}
        with (tmp_path / "metrics.jsonl").open("a") as opened:
            opened.write(json.dumps(line) + "\n")
        checkpoint.write(tmp_path, position(step), network, optimizer, keep_best=True)
        # The second until nobody who goes back to the last but one can need it.
        best = {1: {1}, 2: {2}, 3: {2}, 4: {2}, 5: {2, 5}, 6: {5}, 7: {5}}[step]
        assert set(steps_of(tmp_path)) == best | {each for each in (step - 1, step) if each}
    assert kept_step(tmp_path, TrainConfig()) == 5 and kept_step(tmp_path, TrainConfig(keep="last")) == 7
    (path_of(tmp_path, 5) / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(MaskLossError, match=r"is not what was written[\s\S]*remove this folder, to go on from step 7"):
        checkpoint.load_kept(tmp_path, 5, network)


def test_nothing_is_pickled(written):
    [place] = (written[0] / "checkpoints").iterdir()
    assert {path.suffix for path in place.iterdir()} == {".safetensors", ".json"}


def test_a_checkpoint_that_was_cut_off_does_not_count(written):
    folder, network, optimizer = written
    half = folder / "checkpoints" / f".step-00000009{files.PARTIAL}"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert steps_of(folder) == [3]
    checkpoint.write(folder, position(4), network, optimizer)
    assert not half.exists()


def _rewrite_state(place, **changes):
    state = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps({**state, **changes}))


def _with_groups(place, **changes):
    groups = json.loads((place / "state.json").read_text())["groups"]
    _rewrite_state(place, groups=[{**groups[0], **changes}, *groups[1:]])


def _with_weights(place, change):
    """Change the weights and write their sum anew, as someone would who means it."""
    state = load_file(place / "model.safetensors")
    change(state)
    save_file(state, place / "model.safetensors")
    sums = json.loads((place / "state.json").read_text())["sums"]
    _rewrite_state(place, sums={**sums, "model.safetensors": checkpoint._sum(place / "model.safetensors")})


DAMAGE = {
    "cut off": (lambda place: (place / "model.safetensors").write_bytes(b"short"), "is not what was written"),
    "one bit": (
        lambda place: (place / "optimizer.safetensors").write_bytes(
            (place / "optimizer.safetensors").read_bytes()[:-1] + b"\x01"
        ),
        "is not what was written",
    ),
    "a missing file": (lambda place: (place / "optimizer.safetensors").unlink(), "there is no optimizer.safetensors"),
    "no description": (lambda place: (place / "state.json").unlink(), "state.json: no such file"),
    "no JSON": (lambda place: (place / "state.json").write_text("{"), "must be one that maskloss train wrote"),
    "a list": (lambda place: (place / "state.json").write_text("[]"), "holds a list"),
    "another version": (lambda place: _rewrite_state(place, schema=99), "another version"),
    "another step": (lambda place: _rewrite_state(place, step=8), "does not fit"),
    "unknown keys": (lambda place: _rewrite_state(place, color="red"), "color"),
    "numbers as text": (lambda place: _rewrite_state(place, seconds="1.5"), "does not fit"),
    "a clock of texts": (lambda place: _rewrite_state(place, clock={"data": "0.25"}), "does not fit"),
    "a list for a clock": (lambda place: _rewrite_state(place, clock=[1]), "does not fit"),
    "a scaler of lists": (lambda place: _rewrite_state(place, scaler={"scale": [1]}), "does not fit"),
    "terms as a number": (lambda place: _rewrite_state(place, terms=3), "does not fit"),
    "pending texts": (lambda place: _rewrite_state(place, pending=[["a", "b"]]), "does not fit"),
    "pending rows of another length": (lambda place: _rewrite_state(place, pending=[[0.1]]), "does not fit"),
    "sums as a list": (lambda place: _rewrite_state(place, sums=[1]), "does not fit"),
    "groups as a dict": (lambda place: _rewrite_state(place, groups={"lr": 1}), "does not fit"),
    "groups of numbers": (lambda place: _rewrite_state(place, groups=[1, 2]), "must be one that maskloss train wrote"),
    "groups without weights": (lambda place: _rewrite_state(place, groups=[{}, {}]), "params"),
    "other weights": (lambda place: _with_groups(place, params=["a"]), "other weights"),
    "a decay as text": (
        lambda place: _with_groups(place, weight_decay="0.5"),
        "weight_decay of its optimizer is '0.5'",
    ),
    "betas as a number": (lambda place: _with_groups(place, betas=0.9), "must be one that maskloss train wrote"),
    "betas as text": (lambda place: _with_groups(place, betas="ab"), "betas of its optimizer is"),
    "no groups": (lambda place: _rewrite_state(place, groups=[]), "other weights"),
    "wrong shapes": (
        lambda place: _with_weights(place, lambda state: state.update({"0.bias": torch.zeros(7)})),
        r"holds 0\.bias as \[7\], the model has \[4\]",
    ),
    "missing weights": (lambda place: _with_weights(place, lambda state: state.pop("0.bias")), r"lacks 0\.bias"),
    "nan": (
        lambda place: _with_weights(place, lambda state: state["0.bias"].fill_(float("nan"))),
        "numbers that are not finite",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(written, case):
    folder, network, _ = written
    damage, message = DAMAGE[case]
    damage(path_of(folder, 3))
    other, optimizer = model_and_optimizer()
    with pytest.raises(MaskLossError, match=message):
        checkpoint.read(folder, 3, other, optimizer)
    assert not torch.equal(other[0].weight, network[0].weight)


def test_terms_that_overflowed_come_back(tmp_path):
    """JSON has no nan; a step that a scaler skips has it between two lines of metrics."""
    network, optimizer = model_and_optimizer()
    odd = position(3)._replace(pending=[[float("nan"), 2.0], [0.5, float("inf")]])
    checkpoint.write(tmp_path, odd, network, optimizer)
    assert checkpoint.read(tmp_path, 3, network, optimizer).pending == [[None, 2.0], [0.5, None]]


def test_the_first_checkpoint_that_cannot_be_written_sends_nobody_to_one(tmp_path, monkeypatch):
    network, optimizer = model_and_optimizer()

    def full(path, tensors):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(MaskLossError, match=r"the disk is full\n  hint: nothing is left$"):
        checkpoint.write(tmp_path, position(3), network, optimizer)


def test_a_file_is_replaced_in_one_move(tmp_path):
    path = tmp_path / "file.json"
    files.write_json(path, {"a": float("nan"), "b": [1, float("inf")]})
    assert json.loads(path.read_text()) == {"a": None, "b": [1, None]}

    def fails(partial):
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, fails)
    assert json.loads(path.read_text())["b"] == [1, None] and len(list(tmp_path.iterdir())) == 1


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path, message in (
        (tmp_path / "file" / "run", "file exists"),
        (tmp_path / "file", "file exists"),
        (tmp_path / "dangling", "file exists"),
        (tmp_path / ("a" * 300), "more than 255 characters"),
        (tmp_path / "new" / ("a" * 300), "more than 255 characters"),
    ):
        with pytest.raises(MaskLossError, match=f"--out must be a folder that can be written to[\\s\\S]*{message}"):
            files.make_folder(path, "--out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def test_a_folder_without_permission():
    """Root may write anywhere, but not into the tables of the kernel."""
    with pytest.raises(MaskLossError, match="--out must be a folder that can be written to"):
        files.make_folder(Path("/proc/run"), "--out")
