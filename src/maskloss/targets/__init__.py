"""What predictions are compared with: `MaskTargets`, how masks become them, and how a batch is collated."""

from maskloss.targets.mask_targets import MaskTargets

__all__ = ["MaskTargets"]
