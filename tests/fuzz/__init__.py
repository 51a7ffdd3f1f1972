"""Random calls of the public API, wrong arguments, and damaged files; `python -m fuzz` runs as many as one likes."""
