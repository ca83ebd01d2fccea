"""Tests. They have the same tree as handpose/."""

import os

# pytest-xdist runs a process per core. With several threads in each, OpenMP's threads wait for one another in a busy
# loop, and the same tests take about three times the CPU time. Libraries read the variable when they are loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
