"""What SPLAM Distil does with the host's model: its UNet in training, the run, and what a run leaves on disk."""
