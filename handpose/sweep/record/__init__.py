"""Records of a sweep: settings, event log, segments of trials, what trials used, and the provenance of its results."""
