"""The page in a real browser, beside a simulated sweep that executes commands as tune.py does."""

import shutil
import subprocess
import sys
import threading
import time

import pytest

from benchmarks.browser import Browser
from handpose.config_files import REPOSITORY
from tests.sweep.whole_sweep import WholeSweep

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")]


@pytest.fixture
def running(tmp_path):
    """A sweep that reports an epoch every tenth of a second until it has to end, and executes commands."""
    sweep = WholeSweep(tmp_path / "hands", "scheduler=fifo", "sweep.max_epochs=1000", "sweep.num_trials=4")
    process = sweep.process(is_new=True)
    process.run(2)
    has_to_end = threading.Event()

    def go_on():
        while not has_to_end.wait(0.1):
            process.run(1)

    thread = threading.Thread(target=go_on)
    thread.start()
    yield sweep.folder
    has_to_end.set()
    thread.join()
    process.leave("interrupted")


@pytest.fixture
def address(running):
    command = [sys.executable, "-m", "handpose.dashboard", str(running)]
    server = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    yield server.stdout.readline().split()[1]
    server.terminate()
    server.wait(30)
    server.stdout.close()


def wait_for(tab, script, *, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not (found := tab.evaluate(script)):
        assert time.monotonic() < end, f"{script}; {tab.console_messages}"
        time.sleep(0.1)
    return found


def test_a_trial_is_stopped_by_its_button_and_seen_stopped(address):
    with Browser(BROWSER) as browser, browser.open_tab(width=1200, height=900) as tab:
        tab.open(address)
        wait_for(tab, "document.querySelector('#trial-1 .state-running') !== null")
        wait_for(tab, "document.querySelectorAll('#curves .trace').length > 0")
        assert "#" not in tab.evaluate("location.href")  # the token
        before = tab.evaluate("document.querySelector('#trial-0').textContent")
        tab.evaluate(
            "[...document.querySelectorAll('#trial-1 button')].find((each) => each.textContent === 'Stop').click()"
        )
        answer = wait_for(tab, "(place('answer').textContent.match(/^stop 1: accepted.*/) || [''])[0]")
        assert "trial 1 is stopped" in answer
        wait_for(tab, "document.querySelector('#trial-1 .state-stopped') !== null")
        assert tab.evaluate("document.querySelector('#trial-0').textContent") != before  # it updates by itself
        assert tab.console_messages == []


def test_without_the_token_the_page_says_what_to_do(address):
    with Browser(BROWSER) as browser, browser.open_tab(width=1200, height=900) as tab:
        tab.open(address.partition("#")[0])
        said = wait_for(tab, "place('problem').textContent")
        assert said == "open the address that the program has printed; it has the token"
