"""Decisions of a sweep: which trial runs next, and what follows from a report or a failure. Does not depend on Ray.

Every decision is first recorded as an event. `history` applies the events to the state from which decisions are made.
"""
