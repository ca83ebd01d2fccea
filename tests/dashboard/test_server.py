"""What the dashboard serves, to whom, and what its commands leave in the folder of a sweep."""

import json
import socket

import pytest
from starlette.testclient import TestClient

from handpose.dashboard.__main__ import main
from handpose.dashboard.live_sweep import LiveSweep
from handpose.dashboard.server import HEADER, make_app
from handpose.sweep.analysis.status import summarise_status
from handpose.sweep.record.interventions import InterventionAnswer, InterventionFiles
from tests.sweep.whole_sweep import METRIC, WholeSweep

TOKEN = "a-secret"
HOST = "127.0.0.1:8000"


@pytest.fixture(scope="module")
def finished_folder(tmp_path_factory):
    return WholeSweep(tmp_path_factory.mktemp("sweeps") / "hands", "scheduler=asha").run().folder


@pytest.fixture
def folder(tmp_path):
    """A sweep that was interrupted."""
    return WholeSweep(tmp_path / "hands", "scheduler=fifo").run(5, last="interrupted").folder


def make_client(folder, *, read_only=False, headers=(), **given):
    app = make_app([LiveSweep(folder)], token=TOKEN, hosts=[HOST, "localhost:8000"], read_only=read_only)
    return TestClient(app, base_url=f"http://{HOST}", headers={HEADER: TOKEN, **dict(headers)}, **given)


def test_a_sweep_is_shown_as_its_status_says_with_its_charts(finished_folder):
    client = make_client(finished_folder)
    assert client.get("/sweeps").json() == ["hands"]
    shown = client.get("/sweeps/0").json()
    status = json.loads(json.dumps(summarise_status(finished_folder)))
    assert shown["status"] == status
    assert shown["charts"].keys() == {"best", "curves"}
    values = [value for trace in shown["charts"]["best"]["data"] for value in trace["y"]]
    (best,) = [trial for trial in status["trials"] if trial["number"] == status["best"]]
    assert values[-1] == pytest.approx(best["metrics"][METRIC], rel=1e-4)


def test_a_sweep_without_a_report_has_no_charts(tmp_path):
    folder = WholeSweep(tmp_path / "hands").run(0, last="interrupted").folder
    assert make_client(folder).get("/sweeps/0").json()["charts"] == {}


def test_a_change_of_the_files_is_shown(tmp_path, monkeypatch):
    sweep = WholeSweep(tmp_path / "hands", "scheduler=fifo")
    sweep.run(3, last="interrupted")
    client = make_client(sweep.folder)
    before = client.get("/sweeps/0").json()
    assert client.get("/sweeps/0").json()["read_at"] == before["read_at"]  # nothing is read again for nothing
    sweep.resume().run()
    monkeypatch.setattr("handpose.dashboard.live_sweep.time.monotonic", lambda: 1e12)
    after = client.get("/sweeps/0").json()
    assert (before["status"]["state"], after["status"]["state"]) == ("interrupted", "finished")


def test_damaged_files_are_one_sentence(folder):
    (folder / "events.jsonl").write_text('{"event": "no such event", "at": 1}\n{}\n')
    answer = make_client(folder).get("/sweeps/0")
    assert answer.status_code == 500
    assert "events.jsonl" in answer.json()["error"]


# --- commands ---------------------------------------------------------------------------------------------------------


def test_a_button_leaves_a_command_whose_answer_is_shown(folder):
    client, files = make_client(folder), InterventionFiles(folder)
    given = client.post("/sweeps/0/commands", json={"action": "stop", "trial": 1})
    assert given.status_code == 202
    (name,) = files.list_ids()
    assert given.json() == {"id": name}
    command = files.read(name)
    assert (command.action, command.trial) == ("stop", 1)
    assert client.get(f"/sweeps/0/commands/{name}").json() is None
    files.write_answer(name, InterventionAnswer(True, "trial 1 is stopped"))
    assert client.get(f"/sweeps/0/commands/{name}").json() == {"accepted": True, "sentence": "trial 1 is stopped"}


@pytest.mark.parametrize(
    "body", [{"action": "budget"}, {"action": "stop"}, {"action": "stop", "trial": "1"}, [], {"trial": 1}, "stop"]
)
def test_a_command_that_no_button_gives_is_refused(folder, body):
    answer = make_client(folder).post("/sweeps/0/commands", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]
    assert InterventionFiles(folder).list_ids() == []


def test_a_body_that_is_not_json_or_too_long_is_refused(folder):
    client = make_client(folder)
    for content in (b"{", b" " * 20_000 + b'{"action": "pause"}', b"\xff"):
        assert client.post("/sweeps/0/commands", content=content).status_code == 400
    assert InterventionFiles(folder).list_ids() == []


def test_a_dashboard_for_reading_gives_no_command(folder):
    client = make_client(folder, read_only=True)
    assert client.post("/sweeps/0/commands", json={"action": "pause"}).status_code == 403
    assert 'data-read-only="yes"' in client.get("/").text
    assert InterventionFiles(folder).list_ids() == []


# --- who may ask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "a-secres", "a-secret ", "é"])
def test_without_the_token_nothing_is_read_or_changed(folder, token):
    client = make_client(folder, headers={HEADER: token.encode("latin-1")})
    for path in ("/sweeps", "/sweeps/0", "/sweeps/0/commands/x"):
        assert client.get(path).status_code == 403
    assert client.post("/sweeps/0/commands", json={"action": "pause"}).status_code == 403
    assert InterventionFiles(folder).list_ids() == []


def test_a_page_of_another_origin_cannot_give_a_command(folder):
    """A browser sends a simple request without the header, and a preflight request before one with it."""
    client = make_client(folder, headers={"origin": "http://evil.example"})
    del client.headers[HEADER]
    simple = client.post("/sweeps/0/commands", content=b'{"action": "pause"}', headers={"content-type": "text/plain"})
    assert simple.status_code == 403
    asked = client.options(
        "/sweeps/0/commands",
        headers={"access-control-request-method": "POST", "access-control-request-headers": HEADER},
    )
    assert not [name for name in asked.headers if name.startswith("access-control-allow")]
    assert InterventionFiles(folder).list_ids() == []


def test_a_name_that_was_made_to_point_here_is_refused(folder):
    client = make_client(folder, headers={"host": "evil.example:8000"})
    assert [client.get(path).status_code for path in ("/", "/sweeps", "/static/live.js")] == [421] * 3


def test_the_page_and_its_files_are_served_with_a_policy_and_nothing_else_is(finished_folder):
    client = make_client(finished_folder)
    for path in ("/", "/static/live.js", "/static/live.css", "/static/report.css", "/static/plotly.js"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
    for path in ("/static/server.py", "/static/..%2fserver.py", "/sweeps/1", "/sweeps/0/commands/absent", "/docs"):
        assert client.get(path).status_code == 404
    assert TOKEN not in client.get("/").text


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["absent"], "absent has no sweep"),
        (["s3://bucket/hands"], "s3://bucket/hands is a URL"),
    ],
)
def test_a_folder_without_a_sweep_is_one_sentence(arguments, reason, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_sentence(finished_folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as left:
            main([str(finished_folder), "--port", str(port)])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: --port {port} cannot be used (")
