"""Distillation of Stable Diffusion models by SPLAM, and the evaluation of what comes out."""
