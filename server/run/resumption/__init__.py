"""The part of a run that outlives its process: its folder, its checkpoints, and the signal that interrupts it."""
