"""What a worker runs: a segment of a trial, its checkpoints and reports, what it uses, and what a trial costs."""
