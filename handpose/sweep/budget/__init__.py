"""How the whole time of a sweep is divided: what fits into its budget, and how much of the budget is used.

`planning` chooses amounts of work from measured costs. `clock` counts the time over all processes that run the sweep.
"""
