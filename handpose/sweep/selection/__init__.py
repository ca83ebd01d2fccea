"""The winner of a sweep: confirmed over fresh seeds, selected, and retrained with the full schedule."""
