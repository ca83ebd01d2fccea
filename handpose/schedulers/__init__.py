"""Who goes on: schedulers decide after each report whether a trial continues, pauses or stops.

`scheduler` has their protocol and FIFO, which trains every trial to its end; ASHA, the median rule and population based
training have a file each.
"""
