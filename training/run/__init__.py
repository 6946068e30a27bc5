"""One distillation: its settings, networks, loop, checkpoints, and what it shows and leaves."""
