"""Data: what lies on the disk, as scenes and batches."""
