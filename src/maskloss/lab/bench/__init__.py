"""The benchmark behind `maskloss bench`: this library against others, on the same inputs, behind a check."""
