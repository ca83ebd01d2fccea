"""What a sweep writes down: its settings, its events, the segments of its trials, and where its results come from."""
