"""The process that runs a sweep: it starts and resumes the sweep, records events, and ends it in an orderly way."""
