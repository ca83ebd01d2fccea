"""Storage of a sweep: access to its checkpoints, their retention, and the copy of its folder in an object store."""
