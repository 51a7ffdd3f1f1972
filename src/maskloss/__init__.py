"""Point-sampled mask losses for PyTorch: binary cross-entropy, Dice, Hungarian matching and the whole criterion."""

__version__ = "0.1.0"
