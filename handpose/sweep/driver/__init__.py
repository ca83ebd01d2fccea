"""The process that runs a sweep: it starts and resumes it, records what happens, and shuts it down in good order."""
