"""Commands: one file for each `maskloss COMMAND`."""
