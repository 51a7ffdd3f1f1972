"""Point-sampled mask losses: match predictions and targets, draw points, and compare them there."""

from maskloss import functional
from maskloss.clips import ClipOptions
from maskloss.criterion import MaskCriterion
from maskloss.distributed import StepTotals, step_totals
from maskloss.errors import MaskLossError, MaskLossTypeError, MissingExtraError
from maskloss.factors import MaskFactors
from maskloss.instances import FoundInstances, find_instances
from maskloss.loss import MaskLoss
from maskloss.matcher import HungarianMatcher
from maskloss.matches import Matches
from maskloss.options import MaskOptions
from maskloss.outputs import CriterionOutput, InstanceLosses, MaskLossOutput
from maskloss.points import PointSampling
from maskloss.step import step
from maskloss.targets import MaskTargets

__version__ = "0.1.0"

__all__ = [
    "ClipOptions", "CriterionOutput", "FoundInstances", "HungarianMatcher", "InstanceLosses", "MaskCriterion",
    "MaskFactors", "MaskLoss", "MaskLossError", "MaskLossOutput", "MaskLossTypeError", "MaskOptions", "MaskTargets",
    "Matches", "MissingExtraError", "PointSampling", "StepTotals", "find_instances", "functional", "step",
    "step_totals",
]  # fmt: skip
