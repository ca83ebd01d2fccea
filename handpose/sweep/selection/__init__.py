"""Confirms the finalists of a sweep with fresh seeds, selects the winner and retrains it with its full schedule."""
