"""Notifications through the real Apprise, to a server on this machine, and to addresses that do not work."""

import json
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from handpose.errors import UserError
from handpose.report.notify import NOTIFIED_EVENTS, Notifier, format_result, notify_of_end, open_addresses
from handpose.report.trial_table import TrialRow, TrialTable
from tests.sweep.whole_sweep import METRIC, WholeSweep


@pytest.fixture
def server():
    """A server that keeps what is posted to it; its status is that of all answers."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(made.status)
            self.end_headers()

        def log_message(self, *args):
            """Say nothing."""

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.status, made.received = 200, received
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def addresses(server, monkeypatch):
    monkeypatch.setenv("NOTIFY_URLS", f"json://user:secret@127.0.0.1:{server.server_port}/hook")
    return open_addresses()


def make_notifier(addresses, *, events=NOTIFIED_EVENTS, gap_s=0.0):
    return Notifier(addresses, events=events, gap_s=gap_s, name="hands")


def list_messages(server):
    return [(each["title"], each["message"]) for each in server.received]


def make_table(*values):
    table = TrialTable(METRIC, "min", 12, 4)
    for number, value in enumerate(values):
        table.rows[number] = TrialRow(number, {"optimizer.lr": 0.01}, "complete", 4, {METRIC: value})
    return table


def test_a_message_arrives(addresses, server):
    notifier = make_notifier(addresses)
    notifier.send("finished", "all is well")
    notifier.close()
    assert list_messages(server) == [("Sweep hands: finished", "all is well")]


def test_only_chosen_events_are_notified(addresses, server):
    notifier = make_notifier(addresses, events=["failed"])
    notifier.send("finished", "all is well")
    notifier.send("failed", "it broke")
    notifier.close()
    assert list_messages(server) == [("Sweep hands: failed", "it broke")]


def test_a_new_best_trial_is_notified_once_and_a_worse_one_is_not(addresses, server):
    notifier = make_notifier(addresses)
    for values in ([20.0], [20.0, 25.0], [20.0, 25.0, 15.0]):
        table = make_table(*values)
        row = table.rows[len(values) - 1]
        notifier.on_trial_end(table, row)
        notifier.on_trial_end(table, row)
    notifier.close()
    assert list_messages(server) == [
        (
            "Sweep hands: new best",
            f"trial {number}: PA-MPJPE {value:.2f} mm after 4 of 4 epochs, with lr 0.01; {ended} of 12 "
            "trials have ended",
        )
        for number, value, ended in ((0, 20, 1), (2, 15, 3))
    ]


def test_new_best_trials_in_quick_succession_are_notified_once(addresses, server):
    notifier = make_notifier(addresses, gap_s=600)
    for values in ([20.0], [20.0, 15.0]):
        table = make_table(*values)
        notifier.on_trial_end(table, table.rows[len(values) - 1])
    notifier.close()
    assert len(server.received) == 1


@pytest.mark.parametrize(
    ("error", "title"),
    [
        (KeyError("a\nb"), "Sweep hands: failed"),
        (InterruptedError("to resume: x"), "Sweep hands: interrupted"),
        (KeyboardInterrupt(), "Sweep hands: interrupted"),
    ],
)
def test_the_end_of_a_sweep_by_an_error_is_notified_and_the_error_goes_on(addresses, server, error, title):
    with (
        pytest.raises(type(error)),
        notify_of_end(make_notifier(addresses), interruptions=(InterruptedError,)),
    ):
        raise error
    assert [each for each, _ in list_messages(server)] == [title]


def test_a_server_that_refuses_is_said_once_without_its_address_and_harms_nothing(addresses, server, capfd):
    server.status = 500
    notifier = make_notifier(addresses)
    notifier.send("failed", "one")
    notifier.send("failed", "two")
    notifier.close()
    assert len(server.received) == 2
    assert capfd.readouterr().err == "a notification could not be sent to all addresses in NOTIFY_URLS\n"


def test_a_library_that_raises_harms_nothing(capfd):
    class Broken:
        def notify(self, **message):
            raise OSError("no route to user:secret@host")

    notifier = make_notifier(Broken())
    notifier.send("failed", "one")
    notifier.close()
    assert "secret" not in capfd.readouterr().err


def test_a_server_that_never_answers_does_not_keep_the_program(addresses, monkeypatch):
    held = threading.Event()
    monkeypatch.setattr("handpose.report.notify._CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(addresses, "notify", lambda **message: held.wait(60))
    notifier = make_notifier(addresses)
    notifier.send("failed", "one")
    notifier.close()
    assert notifier._thread.is_alive()
    held.set()
    notifier._thread.join()


def test_an_address_that_cannot_be_read_is_refused_without_its_secret(monkeypatch):
    monkeypatch.setenv("NOTIFY_URLS", "json://localhost slak://token-1234")
    with pytest.raises(
        UserError, match=r"NOTIFY_URLS: address 2 of 2 \(slak://\.\.\.\) is not one that Apprise"
    ) as error:
        open_addresses()
    assert "1234" not in str(error.value)


@pytest.mark.parametrize("url", ["hunter2-secret-token", "hunter2:secret", "HUNTER2://x"])
def test_what_may_be_a_secret_is_not_printed(monkeypatch, url):
    monkeypatch.setenv("NOTIFY_URLS", f"json://localhost {url}")
    with pytest.raises(UserError, match="address 2 of 2 is not one") as error:
        open_addresses()
    assert "hunter" not in str(error.value).lower()


def test_a_message_is_escaped_for_a_service_that_shows_html():
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        import apprise
    shown = []

    class Html(apprise.NotifyBase):
        service_name, protocol = "html", "html"
        notify_format = apprise.NotifyFormat.HTML

        def send(self, body, **given):
            shown.append(body)
            return True

    addresses = apprise.Apprise()
    addresses.add(Html(host="localhost"))
    notifier = make_notifier(addresses)
    notifier.send("failed", "expected <class 'int'> & got")
    notifier.close()
    assert "&lt;class" in shown[0]
    assert "<class" not in shown[0]


def test_without_addresses_nothing_is_sent(monkeypatch):
    monkeypatch.delenv("NOTIFY_URLS", raising=False)
    assert open_addresses() is None
    notifier = make_notifier(None)
    notifier.send("failed", "one")
    notifier.close()
    assert notifier._thread is None


def test_a_sweep_notifies_of_its_best_trials_and_its_files_have_no_address(addresses, server, tmp_path):
    notifier = make_notifier(addresses)
    sweep = WholeSweep(tmp_path / "sweep", "scheduler=fifo", notifier=notifier).run()
    notifier.close()
    best = [message for title, message in list_messages(server) if title == "Sweep hands: new best"]
    assert best
    assert best[-1].startswith(f"trial {sweep.table.rank_trials()[0].number}: ")
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"secret" not in written


def test_a_result_is_one_sentence():
    table = make_table(20.0)
    report = Path("sweeps/hands/report.html")
    assert format_result(table, table.rows[0], {"test/pa_mpjpe_mm": 21.5}, report) == (
        "the winner is trial 0: PA-MPJPE 20.00 mm; retrained: test PA-MPJPE 21.50 mm; report: sweeps/hands/report.html"
    )
    assert format_result(table, table.rows[0], None, report).endswith("20.00 mm; report: sweeps/hands/report.html")
