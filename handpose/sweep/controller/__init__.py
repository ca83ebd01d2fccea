"""What a sweep decides: which trial is next, what follows from a report or a failure. Nothing here knows Ray.

Every decision is an event first; `history` folds the events into the state that the next decision is made from.
"""
