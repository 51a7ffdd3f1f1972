"""The loop: a run, its folder, its checkpoints, its clock."""
