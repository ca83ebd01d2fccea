"""Records of a sweep: its settings, its event log, the segments of its trials, what they used, and the provenance of its
results."""
