"""Commands that measure, a table each. Run from the repository root: `python -m benchmarks.<name>`."""
