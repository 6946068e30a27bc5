"""Commands that measure and show, and what they share. Run from the repository root: `python -m benchmarks.<name>`."""
