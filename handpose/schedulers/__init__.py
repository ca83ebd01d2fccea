"""Schedulers, which decide after each report whether a trial continues, pauses or stops.

`scheduler` has the protocol and FIFO, which trains every trial to its end. ASHA, the median stopping rule and
population-based training have a file each.
"""
