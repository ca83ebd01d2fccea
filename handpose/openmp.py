"""Makes the threads of OpenMP sleep at barriers, instead of spin, while other programs use the same cores.

torch computes with GNU OpenMP. After each operation, threads that wait for the others spin for some milliseconds before
they sleep (GOMP_SPINCOUNT in GCC's manual). On free cores this is right: with small images, a training whose threads
sleep at once takes 1.6 times as long. But if other programs use the same cores, the threads spin while the one they
wait for has no core, and the training becomes many times slower than its share of the cores would let it be
(benchmarks/contention.py).

OpenMP reads its settings only once, when it is loaded. But as the manual says, threads spin only for microseconds while
there are more OpenMP threads than CPUs, so further threads, which only sleep, switch the spinning off.
"""

import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables that set how threads wait: in general, for GNU, and for LLVM and Intel (KMP)."""

_INTERVAL_S = 0.5
_MIN_LOST_CORES = 0.5  # one busy process beside two threads on two cores takes 0.67
_MIN_HOLD_S, _MAX_HOLD_S = 4.0, 30.0


class ContentionWatch:
    """Decides whether other programs use the cores of this process.

    Threads that spin use all cores that they get. While they do, the time that they wait for a core is what they lose
    to others. Once they sleep at barriers, it says little. So the decision that the cores are contended holds for some
    seconds, and is then tried again: for longer each time, as long as it turns out the same.

    Args:
        read_wait_s: returns the seconds that all threads of this process together have waited for a core so far.
        clock: returns monotonic seconds.

    Attributes:
        lost_cores: how many cores other programs take from this process; 0: the cores are free.
    """

    def __init__(self, read_wait_s: Callable[[], float], *, clock: Callable[[], float] = time.monotonic) -> None:
        self.lost_cores = 0.0
        self._read_wait_s = read_wait_s
        self._clock = clock
        self._hold_s = _MIN_HOLD_S
        self._hold_until = 0.0
        self._restart_sample()
        self._free_since = self._sampled_at - _MAX_HOLD_S

    def update(self) -> None:
        """Decide anew. Call this every half second."""
        if self.lost_cores and self._clock() < self._hold_until:
            return
        if self.lost_cores:
            self.lost_cores = 0.0
            self._restart_sample()
            self._free_since = self._sampled_at
            return
        sampled_at, waited_s = self._sampled_at, self._waited_s
        self._restart_sample()
        now = self._sampled_at
        lost = (self._waited_s - waited_s) / max(now - sampled_at, 1e-3)
        if lost >= _MIN_LOST_CORES:
            was_free = now - self._free_since >= _MAX_HOLD_S
            self._hold_s = _MIN_HOLD_S if was_free else min(2 * self._hold_s, _MAX_HOLD_S)
            self._hold_until = now + self._hold_s
            self.lost_cores = lost

    def _restart_sample(self) -> None:
        self._sampled_at, self._waited_s = self._clock(), self._read_wait_s()


class SleepingThreads:
    """Switches off the spinning of OpenMP's threads in this process by more threads than there are CPUs."""

    def __init__(self) -> None:
        self._libraries = [ctypes.CDLL(path) for path in _find_loaded_libraries()]
        self._release: threading.Event | None = None

    def start(self) -> None:
        """Start the threads, which only sleep. Without GNU OpenMP, or if they already run, do nothing."""
        if self._libraries and self._release is None:
            self._release = threading.Event()
            threading.Thread(target=self._hold, args=(self._release,), daemon=True).start()

    def stop(self) -> None:
        """End the threads, if they run."""
        if self._release is not None:
            self._release.set()
            self._release = None

    def _hold(self, release: threading.Event) -> None:
        """Own a team of threads until the release; OpenMP ends it together with the thread that this runs in."""
        for library in self._libraries:
            library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            work = ctypes.cast(library.omp_in_parallel, ctypes.c_void_p)  # any function that does nothing
            library.GOMP_parallel(work, None, library.omp_get_num_procs() + 1, 0)
        release.wait()


@functools.cache
def watch_contention() -> ContentionWatch:
    """Start to watch the cores of this process, and let its OpenMP threads sleep at barriers while they are contended.

    If the user has set how the threads wait, they do that, and the cores count as free.
    """
    watch = ContentionWatch(read_wait_s)
    if not any(os.environ.get(name) for name in WAIT_VARIABLES):
        threading.Thread(target=_keep_watching, args=(watch, SleepingThreads()), daemon=True).start()
    return watch


def _keep_watching(watch: ContentionWatch, sleeping: SleepingThreads) -> None:
    while True:
        time.sleep(_INTERVAL_S)
        watch.update()
        if watch.lost_cores:
            sleeping.start()
        else:
            sleeping.stop()


def read_wait_s() -> float:
    """Return the seconds that the threads of this process together have waited for a core; 0 if this is not known."""
    waited_ns = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited_ns += int(file.read_text(encoding="ascii").split()[1])
        except OSError:  # the thread has ended
            continue
    return waited_ns / 1e9


def _find_loaded_libraries() -> set[str]:
    """Return the files of GNU OpenMP that this process has loaded; packages other than torch may bring their own."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return set()
    paths = (line.partition("/")[2] for line in lines)
    return {f"/{path}" for path in paths if path.rpartition("/")[2].startswith("libgomp")}
