"""Run a sweep in S3 that loses its machine twice and its store twice. Count what is lost or wrong.

    python benchmarks/s3_drill.py --moto PYTHON --output s3_drill.json

The store is moto's server on loopback, run by a Python that has it (`pip install "moto[server]"` in its own
environment). The sweep trains real networks on synthetic hands, with confirmation and retraining. Twice its driver is
killed with SIGKILL and its folder removed, and it is resumed in another folder from the store. In the second part the
store is unreachable for a while (connections are refused), in the last one it hangs. At the end the sweep is audited
(handpose/sweep/audit). It is compared with what the store contained when a machine was lost, and, report by report and
to the last digit, with the same sweep without interruptions and without a store.
"""

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from handpose.files import write_json  # noqa: E402
from handpose.sweep.audit.audit import audit  # noqa: E402
from handpose.sweep.record.events import EVENTS_FILE, EpochReported, TrialEnded, TrialSuggested, read_events  # noqa: E402
from handpose.sweep.storage.object_store import ObjectStore  # noqa: E402
from handpose.sweep.storage.stored_sweep import download_events  # noqa: E402

_SWEEP_OVERRIDES = (
    "sweep.name=drill",
    "data.source.num_train=240",
    "data.source.num_eval=20",
    "data.image_size=64",
    "trainer.max_epochs=2",
    "sweep.num_trials=8",
    "sweep.max_epochs=4",
    "sweep.max_concurrent=1",
    "sweep.preflight=off",
    "sweep.confirm.top_k=1",
    "sweep.confirm.seeds=1",
    "scheduler.mode=promote",
    "trainer.accelerator=cpu",
    "sweep.gpus_per_trial=0",
)
_KILL_AFTER_REPORTS = (8, 16)
"""Number of proposals, reports and decisions in the log after which the driver is killed."""

_BUCKET = "sweeps"
_URL = f"s3://{_BUCKET}/drills"
_LIMIT_S = 3600.0
_EXPECTED_FILES = ("sweep.yaml", "trials.csv", "best.yaml", "report.html", "study/journal.log", "retrain/metrics.json")
"""Files that the store must contain when the sweep has finished."""


@dataclass
class DriverRun:
    """The run of one driver.

    Attributes:
        outage: the kind of outage during it.
        seconds: its duration.
        num_known: number of decisions in its log at its end.
        num_stored: number of decisions in the store's log.
        lost: number of decisions in the store's earlier log with which this driver's log does not start.
        messages: its messages about the storage.
    """

    outage: str
    seconds: float = 0.0
    num_known: int = 0
    num_stored: int = 0
    lost: int = 0
    messages: list[str] = field(default_factory=list)


def main() -> None:
    """Run the drill. The exit status is 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--moto", default=sys.executable, metavar="PYTHON", help="path of a Python that has moto[server]"
    )
    parser.add_argument(
        "--outage-s",
        type=float,
        default=25.0,
        help="duration of each outage of the store in seconds; default: %(default)s",
    )
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    if subprocess.run([given.moto, "-c", "import moto.server"], capture_output=True).returncode:
        sys.exit(
            f'error: {given.moto} has no moto: python -m venv DIR, DIR/bin/pip install "moto[server]", --moto PYTHON'
        )
    secret = secrets.token_hex(20)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, start_moto(given.moto) as server:
        door = TcpProxy(server.port)
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{door.port}",
            "AWS_ACCESS_KEY_ID": "drill",
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}/{_BUCKET}", method="PUT")
        urllib.request.urlopen(request).close()
        content = _run_drill(Path(folder), server, door, outage_s=given.outage_s, secret=secret)
    if given.output:
        write_json(given.output, {"date": time.strftime("%Y-%m-%d"), **content}, indent=1)
    sys.exit(1 if any(content["found"].values()) else 0)


def _run_drill(
    folder: Path, server: "MotoServer", door: "TcpProxy", *, outage_s: float, secret: str
) -> dict[str, dict[str, Any]]:
    parts = [DriverRun("none"), DriverRun("refused"), DriverRun("hanging")]
    outages: list[Callable[[], contextlib.AbstractContextManager[None]]] = [
        contextlib.nullcontext,
        door.interrupt,
        server.pause,
    ]
    stored: list[object] = []
    for number, (part, outage) in enumerate(zip(parts, outages, strict=True)):
        machine = folder / f"machine_{number}"
        machine.mkdir()
        began = time.monotonic()
        overrides = [*_SWEEP_OVERRIDES, f"sweep.storage={_URL}"] if number == 0 else [f"sweep.resume={_URL}/drill"]
        driver = _start_driver(machine, overrides)
        _wait_until(partial(_has_more_reports, machine, len(stored) + 2), driver, machine)
        with outage():
            if part.outage != "none":
                reports = _count_reports(machine)
                time.sleep(outage_s)
                _wait_until(partial(_has_more_reports, machine, reports), driver, machine)
        if number < 2:
            _wait_until(partial(_has_more_reports, machine, _KILL_AFTER_REPORTS[number]), driver, machine)
            driver.kill()
        status = driver.wait(timeout=_LIMIT_S)
        if status not in (0, -signal.SIGKILL):
            sys.exit(f"the driver ended with {status}:\n{(machine / 'log').read_text(encoding='utf-8')[-3000:]}")
        part.seconds = time.monotonic() - began
        known = _read_decisions(_get_sweep_folder(machine))
        part.lost = sum(one != other for one, other in zip(stored, known, strict=False)) + max(
            0, len(stored) - len(known)
        )
        stored = _read_stored_decisions()
        part.num_known, part.num_stored = len(known), len(stored)
        part.messages = [
            line for line in (machine / "log").read_text(encoding="utf-8").splitlines() if line.startswith("storage ")
        ]
        print(_format_part(part), flush=True)
        for line in part.messages:
            print(f"  {line}")
        if number < 2:
            shutil.rmtree(machine)  # lose the machine
    last = _get_sweep_folder(folder / "machine_2")
    found = (
        _count_findings(last, secret)
        | {"values_differ": _count_differences(last, _run_reference_sweep(folder))}
        | {"lost_at_a_kill": sum(part.lost for part in parts)}
    )
    print("\n" + "  ".join(f"{name} {number}" for name, number in found.items()))
    return {"found": found, "parts": {str(number): asdict(part) for number, part in enumerate(parts)}}


def _format_part(part: DriverRun) -> str:
    return (
        f"outage {part.outage:8} {part.num_known:3} decisions in the log, {part.num_stored:3} in the store  "
        f"lost of the store's before {part.lost}  {part.seconds:.0f} s"
    )


def _count_differences(last: Path, alone: Path) -> int:
    ours, reference = _read_decisions(last), _read_decisions(alone)
    lengths = abs(len(ours) - len(reference))
    return lengths + sum(one != other for one, other in zip(ours, reference, strict=False))


def _count_findings(last: Path, secret: str) -> dict[str, int]:
    """Count findings. All numbers should be 0."""
    findings = audit(last)
    for sentence in (*findings.lost, *findings.repeated, *findings.wrong):
        print(f"  {sentence}")
    store = ObjectStore(f"{_URL}/drill")
    names = set(store.list_files())
    kept = {name for name in names if name.startswith("checkpoints/")}
    local = [file for file in last.rglob("*") if file.is_file()]
    found = {
        "lost": len(findings.lost),
        "repeated": len(findings.repeated),
        "wrong": len(findings.wrong),
        "missing_in_store": len(set(_EXPECTED_FILES) - names),
        "checkpoints_too_many": max(0, len(kept) - 2 * 8),
        "files_with_the_secret": sum(secret.encode() in file.read_bytes() for file in local)
        + sum(secret.encode() in store.read(name) for name in names),
    }
    print("  ".join(f"{name} {number}" for name, number in found.items()), flush=True)
    return found


def _run_reference_sweep(folder: Path) -> Path:
    machine = folder / "alone"
    machine.mkdir()
    status = _start_driver(machine, [*_SWEEP_OVERRIDES]).wait(timeout=_LIMIT_S)
    if status:
        sys.exit(f"the sweep left alone ended with {status}:\n{(machine / 'log').read_text(encoding='utf-8')[-3000:]}")
    return _get_sweep_folder(machine)


def _start_driver(place: Path, overrides: Sequence[str]) -> "subprocess.Popen[bytes]":
    with (place / "log").open("a", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, REPOSITORY / "tune.py", *overrides], cwd=place, stdout=log, stderr=log)


def _get_sweep_folder(place: Path) -> Path:
    return place / "outputs" / "sweeps" / "drill"


def _has_more_reports(place: Path, number: int) -> bool:
    return _count_reports(place) > number


def _count_reports(place: Path) -> int:
    return len(_read_decisions(_get_sweep_folder(place)))


def _read_stored_decisions() -> list[object]:
    with tempfile.TemporaryDirectory() as folder:
        download_events(ObjectStore(f"{_URL}/drill"), Path(folder))
        return _read_decisions(Path(folder))


def _read_decisions(folder: Path) -> list[object]:
    """Read proposals, reports and decisions, without times, nodes and segments."""
    kept = [
        event
        for event in read_events(folder / EVENTS_FILE)
        if isinstance(event, (TrialSuggested, EpochReported, TrialEnded))
    ]
    forgotten = ("at", "node", "resumed_from", "checkpoint", "note")
    return [{name: value for name, value in asdict(event).items() if name not in forgotten} for event in kept]


def _wait_until(condition: Callable[[], bool], driver: "subprocess.Popen[bytes]", place: Path) -> None:
    end = time.monotonic() + _LIMIT_S
    while not condition():
        if driver.poll() is not None or time.monotonic() > end:
            sys.exit(f"the driver ended, or does nothing:\n{(place / 'log').read_text(encoding='utf-8')[-3000:]}")
        time.sleep(0.2)


# --- the store --------------------------------------------------------------------------------------------------------


@dataclass
class MotoServer:
    """moto's server, which holds its content in memory."""

    process: "subprocess.Popen[bytes]"
    port: int

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Let the server accept connections but not answer, within the block."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def start_moto(python: str) -> Iterator[MotoServer]:
    """Run a server on loopback within the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not _is_answering(port):
            time.sleep(0.1)
        yield MotoServer(process, port)
    finally:
        process.kill()
        process.wait()


def _is_answering(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


class TcpProxy:
    """A port that forwards to another port of this machine while it is open."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._links: list[socket.socket] = []
        self.port = 0
        self._open()

    @contextlib.contextmanager
    def interrupt(self) -> Iterator[None]:
        """Cut and refuse connections within the block."""
        self.close()
        try:
            yield
        finally:
            self._open()

    def close(self) -> None:
        """Cut connections, and refuse them from now on."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for link in self._links:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        self._links.clear()

    def _open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._links += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=_forward, args=(source, sink), daemon=True).start()


def _forward(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while content := source.recv(2**16):
            sink.sendall(content)
    for each in (source, sink):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


if __name__ == "__main__":
    main()
