"""Clips: what their loss is computed of, and how their matches become those of planes, an instance in a frame each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskloss import _inputs
from maskloss._abi import QUERY, TARGET
from maskloss.errors import Cause, describe, reported
from maskloss.matches import Matches
from maskloss.targets import MaskTargets

FRAMES = ("all", "present")
DIVISORS = ("instances", "frames")


@dataclass(frozen=True)
class ClipOptions:
    """What the mask terms of clips are made of, for logits `[B, Q, T, h, w]` and targets `[N, T, H, W]`.

    An instance has one query in all T frames, and in each frame a plane: P points of its own, of which the uncertain
    ones are chosen, a cross-entropy and a Dice. The matching compares whole clips, at the same P points in each frame.

    Args:
        frames: "all" (default): where an instance is away, its mask has to be empty; or "present": only the frames
            that it is in count (`MaskTargets.present`).
        divide_by: the sums over instances and frames are divided by the number of "instances" (default), or of the
            "frames" that count, of all instances.

    Raises:
        MaskLossError: a value that is none of these.

    Source:
        The defaults are those of Mask2Former for video (Cheng et al., 2021), whose loss of T frames so is T times that
        of one.

    Example:
        >>> ClipOptions(frames="present").divide_by
        'instances'
    """

    frames: str = "all"
    divide_by: str = "instances"

    def __post_init__(self) -> None:
        self._check()

    @reported("ClipOptions")
    def _check(self) -> None:
        _inputs.check_choice("frames", self.frames, FRAMES)
        _inputs.check_choice("divide_by", self.divide_by, DIVISORS)


_DEFAULT = ClipOptions()


def check_clip_options(clips: ClipOptions | None) -> ClipOptions | None:
    """Raise unless these are `ClipOptions`, or None for the default ones."""
    if clips is not None and not isinstance(clips, ClipOptions):
        raise Cause("clips must be ClipOptions", f"got {describe(clips)}", 'ClipOptions(frames="present")')
    return clips


def weights_of_planes(
    clips: ClipOptions | None, matches: Matches, targets: MaskTargets, weights: Tensor | None
) -> Tensor | None:
    """Return the weights of all planes of the matched instances, `[N * T]`; None where all are 1.

    Args:
        clips: which frames count.
        matches: the instances.
        targets: of clips.
        weights: of the instances, `[N]`, or None.
    """
    clips = clips or _DEFAULT
    repeated = None if weights is None else weights.repeat_interleave(targets.frames)
    if clips.frames == "all" or targets.present is None:
        return repeated
    present = targets.present[matches.target_rows(targets.first_rows)].flatten()
    return present.to(torch.float32) if repeated is None else repeated * present


def weights_of_divisor(
    clips: ClipOptions | None, matches: Matches, targets: MaskTargets, weights: Tensor | None
) -> Tensor | None:
    """Return how much each matched instance adds to the divisor, `[N]`; None where it is `frames_of_divisor`."""
    clips = clips or _DEFAULT
    if clips.divide_by == "instances" or clips.frames == "all" or targets.present is None:
        return weights
    present = targets.present[matches.target_rows(targets.first_rows)].sum(1, dtype=torch.float32)
    return present if weights is None else weights * present


def frames_of_divisor(clips: ClipOptions | None, targets: MaskTargets) -> int:
    """Return how often an instance counts in the divisor, beside its weight."""
    clips = clips or _DEFAULT
    return targets.frames if (clips.divide_by, clips.frames) == ("frames", "all") else 1


def matches_of_planes(matches: Matches, frames: int) -> Matches:
    """List each instance once for every frame: query q in frame t is q * T + t, and so are targets."""
    index = matches.index.repeat_interleave(frames, 0)
    frame = torch.arange(frames, device=index.device).repeat(matches.index.shape[0])
    index[:, QUERY] = index[:, QUERY] * frames + frame
    index[:, TARGET] = index[:, TARGET] * frames + frame
    return replace(
        matches,
        index=index,
        layer_sizes=tuple(size * frames for size in matches.layer_sizes),
        num_queries=matches.num_queries * frames,
        num_targets=tuple(count * frames for count in matches.num_targets),
        classes=None,
        counts=None if matches.counts is None else tuple(count * frames for count in matches.counts),
    )
