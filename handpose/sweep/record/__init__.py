"""Records of a sweep: its settings, its event log, the segments of its trials and the provenance of its results."""
