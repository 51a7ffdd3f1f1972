"""Clips: what their loss is computed of, and how their matches become those of planes, an instance in a frame each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskloss import _inputs
from maskloss._abi import QUERY, TARGET, Stack
from maskloss.errors import Cause, describe, reported_init
from maskloss.layers import Layer
from maskloss.matches import Matches
from maskloss.targets import MaskTargets

UNITS = ("frame", "clip", "volume")
FRAMES = ("all", "present")
DIVISORS = ("instances", "frames")


@reported_init
@dataclass(frozen=True)
class ClipOptions:
    """What the mask terms of clips and volumes are made of, for logits `[B, Q, T, h, w]` and targets `[N, T, H, W]`.

    The unit is where P points are drawn, where uncertainty is ranked, and over which Dice is summed. An instance of a
    clip has a unit in each frame, by default, while its query is matched over all of them, at the same points in each.
    Or the whole clip is one unit, and the matching has P points in all of it. A volume is one, too, and is read
    trilinearly; there, logits and targets may have different numbers of slices.

    Args:
        unit: "frame" (default), "clip" or "volume".
        frames: "all" (default): where an instance is absent, its mask has to be empty; or "present": only the frames
            that it is in count (`MaskTargets.present`), for the unit "frame".
        divide_by: the sums over instances and frames are divided by the number of "instances" (default), or of the
            "frames" that count, of all instances, for the unit "frame".

    Raises:
        MaskLossError: a value that is none of these, or an option of frames for another unit.

    Source:
        The defaults are those of Mask2Former for video (Cheng et al., 2021), whose loss of T frames so is T times that
        of one. OccFormer (Zhang et al., 2023) draws points of volumes.

    Example:
        >>> ClipOptions(frames="present").divide_by
        'instances'
    """

    unit: str = "frame"
    frames: str = "all"
    divide_by: str = "instances"

    def __post_init__(self) -> None:
        """Check the values."""
        _inputs.check_choice("unit", self.unit, UNITS)
        _inputs.check_choice("frames", self.frames, FRAMES)
        _inputs.check_choice("divide_by", self.divide_by, DIVISORS)
        if self.unit != "frame" and (self.frames, self.divide_by) != ("all", "instances"):
            raise Cause(
                'frames and divide_by belong to unit="frame"',
                f"unit={self.unit!r}, frames={self.frames!r}, divide_by={self.divide_by!r}",
                "where the whole clip is one unit all of its frames count, once for each instance",
            )


_DEFAULT = ClipOptions()


def check_clip_options(clips: ClipOptions | None) -> ClipOptions | None:
    """Raise unless these are `ClipOptions`, or None for the default ones."""
    if clips is not None and not isinstance(clips, ClipOptions):
        raise Cause("clips must be ClipOptions", f"got {describe(clips)}", 'ClipOptions(frames="present")')
    return clips


def check_same_unit(clips: ClipOptions | None, others: ClipOptions | None) -> None:
    """Raise if a criterion and its matcher have different units."""
    mine, theirs = (clips or _DEFAULT).unit, (others or _DEFAULT).unit
    if mine != theirs:
        raise Cause(
            "matcher and criterion must have the same unit of clips",
            f"the matcher has {theirs!r}, the criterion {mine!r}",
            "give both the same clips=ClipOptions(...)",
        )


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


def is_whole(clips: ClipOptions | None, logits: Layer) -> bool:
    """Whether all frames or slices of an instance are one unit."""
    return logits.ndim == 5 and (clips or _DEFAULT).unit != "frame"


def stack_of(clips: ClipOptions | None, logits: Sequence[Layer], targets: MaskTargets) -> Stack | None:
    """Say how whole clips or volumes are read; None where each frame is a unit, or where these are images.

    Raises:
        Cause: clips whose logits and targets have different frames, or volumes whose targets have no slices.
    """
    clips, first = clips or _DEFAULT, logits[0]
    if first.ndim != 5:
        return None
    if clips.unit != "volume" and targets.frames != first.shape[2]:
        raise Cause(
            "mask_logits and targets must have the same frames",
            f"mask_logits {list(first.shape)}, targets of {targets.frames} frame(s)",
            "those of clips are logits [B, Q, T, h, w] and masks [N, T, H, W]; slices of volumes may differ",
        )
    if clips.unit == "frame":
        return None
    if clips.unit == "volume" and targets.num_masks and targets.present is None:
        raise Cause(
            "volumes need targets with a dimension of slices",
            f"got {describe(targets)}",
            "give masks [N, D, H, W], or label maps [D, H, W]",
        )
    return Stack(targets.frames, clips.unit == "volume")
