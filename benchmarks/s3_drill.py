"""A sweep that is kept in S3, whose machine is lost twice and whose store is out twice; counts what was lost or wrong.

    python benchmarks/s3_drill.py --moto PYTHON --output s3_drill.json

The store is moto's server on loopback, run by a Python that has it (`pip install "moto[server]"` in an environment of
its own). The sweep is one of real networks on synthetic hands, with confirmation and retraining. Its driver is ended by
SIGKILL and its folder removed; it goes on in another folder from what the store has, and once more. In the second part
the store is out of reach for a while (connections are refused), in the last one it hangs. At the end the sweep is
audited (handpose/sweep/audit), held against what the store knew when a machine was lost and, report by report and to
the last digit, against the same sweep left alone without a store.
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

from handpose.sweep.audit.audit import audit  # noqa: E402
from handpose.sweep.record.events import EVENTS_FILE, Asked, Ended, Reported, read_events  # noqa: E402
from handpose.sweep.storage.object_store import ObjectStore  # noqa: E402
from handpose.sweep.storage.stored_sweep import download_events  # noqa: E402
from handpose.whole_file import write_json  # noqa: E402

_SWEEP = (
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
_KILLED_AFTER = (8, 16)
"""Proposals and reports in the log."""

_BUCKET = "sweeps"
_URL = f"s3://{_BUCKET}/drills"
_LIMIT_S = 3600.0
_WHOLE = ("sweep.yaml", "trials.csv", "best.yaml", "report.html", "study/journal.log", "retrain/metrics.json")
"""What a user finds in the store when the sweep is done."""


@dataclass
class Part:
    """What one driver did. known: reports that its log had at its end; stored: of these the store's.

    lost: reports of the store's log that the next driver's did not begin with.
    """

    outage: str
    seconds: float = 0.0
    known: int = 0
    stored: int = 0
    lost: int = 0
    said: list[str] = field(default_factory=list)


def main() -> None:
    """Run the drill; status 1 where anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moto", default=sys.executable, metavar="PYTHON", help="that has moto[server]")
    parser.add_argument("--outage-s", type=float, default=25.0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if subprocess.run([given.moto, "-c", "import moto.server"], capture_output=True).returncode:
        sys.exit(
            f'error: {given.moto} has no moto: python -m venv DIR, DIR/bin/pip install "moto[server]", --moto PYTHON'
        )
    secret = secrets.token_hex(20)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, moto(given.moto) as server:
        door = Door(server.port)
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{door.port}",
            "AWS_ACCESS_KEY_ID": "drill",
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}/{_BUCKET}", method="PUT")
        urllib.request.urlopen(request).close()
        content = _drill(Path(folder), server, door, outage_s=given.outage_s, secret=secret)
    if given.output:
        write_json(given.output, {"date": time.strftime("%Y-%m-%d"), **content}, indent=1)
    sys.exit(1 if any(content["found"].values()) else 0)


def _drill(folder: Path, server: "Server", door: "Door", *, outage_s: float, secret: str) -> dict[str, dict[str, Any]]:
    parts = [Part("none"), Part("refused"), Part("hanging")]
    outages: list[Callable[[], contextlib.AbstractContextManager[None]]] = [
        contextlib.nullcontext,
        door.closed,
        server.stopped,
    ]
    before: list[object] = []
    for number, (part, outage) in enumerate(zip(parts, outages, strict=True)):
        place = folder / f"machine_{number}"
        place.mkdir()
        began = time.monotonic()
        overrides = [*_SWEEP, f"sweep.storage={_URL}"] if number == 0 else [f"sweep.resume={_URL}/drill"]
        driver = _started(place, overrides)
        _until(partial(_has_more, place, len(before) + 2), driver, place)
        with outage():
            if part.outage != "none":
                reports = _num_reports(place)
                time.sleep(outage_s)
                _until(partial(_has_more, place, reports), driver, place)
        if number < 2:
            _until(partial(_has_more, place, _KILLED_AFTER[number]), driver, place)
            driver.kill()
        status = driver.wait(timeout=_LIMIT_S)
        if status not in (0, -signal.SIGKILL):
            sys.exit(f"the driver ended with {status}:\n{(place / 'log').read_text(encoding='utf-8')[-3000:]}")
        part.seconds = time.monotonic() - began
        known = _decisions(_sweep_of(place))
        part.lost = sum(one != other for one, other in zip(before, known, strict=False)) + max(
            0, len(before) - len(known)
        )
        before = _stored_decisions()
        part.known, part.stored = len(known), len(before)
        part.said = [
            line for line in (place / "log").read_text(encoding="utf-8").splitlines() if line.startswith("storage ")
        ]
        print(_line(part), flush=True)
        for line in part.said:
            print(f"  {line}")
        if number < 2:
            shutil.rmtree(place)  # the machine is lost
    last = _sweep_of(folder / "machine_2")
    found = (
        _found(last, secret)
        | {"values_differ": _differing(last, _alone(folder))}
        | {"lost_at_a_kill": sum(part.lost for part in parts)}
    )
    print("\n" + "  ".join(f"{name} {number}" for name, number in found.items()))
    return {"found": found, "parts": {str(number): asdict(part) for number, part in enumerate(parts)}}


def _line(part: Part) -> str:
    return (
        f"outage {part.outage:8} {part.known:3} decisions in the log, {part.stored:3} in the store  "
        f"lost of the store's before {part.lost}  {part.seconds:.0f} s"
    )


def _differing(last: Path, alone: Path) -> int:
    ours, reference = _decisions(last), _decisions(alone)
    lengths = abs(len(ours) - len(reference))
    return lengths + sum(one != other for one, other in zip(ours, reference, strict=False))


def _found(last: Path, secret: str) -> dict[str, int]:
    """Numbers that are to be 0."""
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
        "missing_in_store": len(set(_WHOLE) - names),
        "checkpoints_too_many": max(0, len(kept) - 2 * 8),
        "files_with_the_secret": sum(secret.encode() in file.read_bytes() for file in local)
        + sum(secret.encode() in store.read(name) for name in names),
    }
    print("  ".join(f"{name} {number}" for name, number in found.items()), flush=True)
    return found


def _alone(folder: Path) -> Path:
    place = folder / "alone"
    place.mkdir()
    status = _started(place, [*_SWEEP]).wait(timeout=_LIMIT_S)
    if status:
        sys.exit(f"the sweep left alone ended with {status}:\n{(place / 'log').read_text(encoding='utf-8')[-3000:]}")
    return _sweep_of(place)


def _started(place: Path, overrides: Sequence[str]) -> "subprocess.Popen[bytes]":
    with (place / "log").open("a", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, REPOSITORY / "tune.py", *overrides], cwd=place, stdout=log, stderr=log)


def _sweep_of(place: Path) -> Path:
    return place / "outputs" / "sweeps" / "drill"


def _has_more(place: Path, number: int) -> bool:
    return _num_reports(place) > number


def _num_reports(place: Path) -> int:
    return len(_decisions(_sweep_of(place)))


def _stored_decisions() -> list[object]:
    with tempfile.TemporaryDirectory() as folder:
        download_events(ObjectStore(f"{_URL}/drill"), Path(folder))
        return _decisions(Path(folder))


def _decisions(folder: Path) -> list[object]:
    """Proposals, reports and decisions, without the time, the place and the stretch."""
    kept = [event for event in read_events(folder / EVENTS_FILE) if isinstance(event, (Asked, Reported, Ended))]
    forgotten = ("at", "node", "resumed_from", "checkpoint", "note")
    return [{name: value for name, value in asdict(event).items() if name not in forgotten} for event in kept]


def _until(is_so: Callable[[], bool], driver: "subprocess.Popen[bytes]", place: Path) -> None:
    end = time.monotonic() + _LIMIT_S
    while not is_so():
        if driver.poll() is not None or time.monotonic() > end:
            sys.exit(f"the driver ended, or does nothing:\n{(place / 'log').read_text(encoding='utf-8')[-3000:]}")
        time.sleep(0.2)


# --- the store --------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """moto's server: what it holds is in its memory."""

    process: "subprocess.Popen[bytes]"
    port: int

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Connections are taken, and nothing comes back."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def moto(python: str) -> Iterator[Server]:
    """A server on loopback, ended after the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not _answers(port):
            time.sleep(0.1)
        yield Server(process, port)
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


class Door:
    """A port that leads to another one of this machine, as long as it is open."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._links: list[socket.socket] = []
        self.port = 0
        self._open()

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Connections are cut and refused."""
        self.close()
        try:
            yield
        finally:
            self._open()

    def close(self) -> None:
        """Cut and refuse them from now on."""
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
                    threading.Thread(target=_pass_on, args=(source, sink), daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while content := source.recv(2**16):
            sink.sendall(content)
    for each in (source, sink):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


if __name__ == "__main__":
    main()
