"""Results: predictions, scores, pictures and the report."""
