"""Tests. They have the same tree as handpose/."""

import os

# pytest-xdist runs a process per core. With several threads in each, OpenMP's threads wait for one another in a busy
# loop: the same tests then take about three times the CPU time. Libraries read it when they are loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
