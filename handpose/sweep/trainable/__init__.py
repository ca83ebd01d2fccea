"""What a worker runs: a segment of a trial, its checkpoints, its reports, and the measurement of what a trial costs."""
