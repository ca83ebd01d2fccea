"""What a worker runs: a segment of a trial, its checkpoints and reports, and the measurement of a trial's cost."""
