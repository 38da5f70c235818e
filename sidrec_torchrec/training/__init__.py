"""How models are trained: process group, output folders, checkpoints, progress, schedule, and the loop."""
