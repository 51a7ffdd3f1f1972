"""What `maskloss train` is made of: scenes, a compact query model, the training loop, evaluation and the report."""
