"""Where a sweep lies: checkpoints and which of them are kept, and the copy of its folder in an object store."""
