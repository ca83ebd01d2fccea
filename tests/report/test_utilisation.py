"""The verdict on what slowed trials down, on shares of time whose cause is known, and the section of the report."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handpose.report.advice import check_utilisation
from handpose.report.html import HtmlPage
from handpose.report.utilisation import PHASES, EpochUtilisation, Utilisation, combine, judge
from handpose.report.utilisation_section import add_utilisation_section
from tests.report.fabricated_records import make_record, make_trial


def make_used(start_up=0.0, data=0.0, training=0.0, validation=0.0, report=0.0, **resources):
    seconds = dict(zip(PHASES, (start_up, data, training, validation, report), strict=True))
    return Utilisation(seconds, **resources)


BUSY = make_used(start_up=5, data=2, training=80, validation=12, report=1)
NO_GPU_READ = make_used(data=60, training=40, gpus=1.0)
CAUSES = {
    "starved by data": make_used(start_up=2, data=55, training=40, validation=3),
    "starved by validation": make_used(start_up=2, data=5, training=40, validation=53),
    "starved by start-up": make_used(start_up=50, data=1, training=40, validation=9),
    "starved by reports": make_used(start_up=2, data=1, training=40, validation=9, report=48),
    "busy": BUSY,
    "unknown": NO_GPU_READ,
}


@pytest.mark.parametrize("verdict", CAUSES)
def test_a_known_cause_is_found(verdict):
    assert judge(CAUSES[verdict]).verdict == verdict


@pytest.mark.parametrize(
    ("verdict", "key"),
    [
        ("starved by data", "data.num_workers"),
        ("starved by validation", "trainer.limit_val_batches"),
        ("starved by start-up", "sweep.max_epochs"),
        ("starved by reports", "sweep.checkpoint_every_epochs"),
    ],
)
def test_a_remedy_names_the_key_to_change(verdict, key):
    assert key in judge(CAUSES[verdict]).remedy


@given(st.tuples(*[st.floats(0.0, 1.0)] * 4), st.none() | st.floats(0, 100))
def test_a_trial_that_trains_for_over_two_thirds_of_its_time_is_never_called_starved(others, gpu_percent):
    training = 2.01 * sum(others) + 0.1
    used = make_used(*others[:2], training, *others[2:], gpus=1.0, gpu_percent=gpu_percent)
    judged = judge(used)
    assert judged.verdict == "busy"
    assert judged.share == pytest.approx(training / (training + sum(others)))


@given(st.tuples(*[st.floats(0.0, 1.0)] * 5))
def test_a_cause_took_at_least_a_third_of_the_time_and_more_than_any_other(seconds):
    used = make_used(*seconds)
    verdict, phase, share, _ = judge(used)
    if verdict != "busy":
        assert share >= 1 / 3
        assert share == max(used.get_share(each) for each in PHASES if each != "training")
    assert share == used.get_share(phase)


@pytest.mark.parametrize(("gpu_percent", "verdict"), [(95.0, "busy"), (40.0, "starved by data")])
def test_waiting_for_data_is_no_cause_while_the_gpu_is_in_use(gpu_percent, verdict):
    assert judge(make_used(data=60, training=40, gpus=0.25, gpu_percent=gpu_percent)).verdict == verdict


def test_a_gpu_in_use_hides_no_other_cause():
    assert judge(make_used(validation=60, training=40, gpus=1.0, gpu_percent=95.0)).verdict == "starved by validation"


def test_a_busy_trial_with_an_idle_gpu_is_told_to_share_it():
    assert "sweep.gpus_per_trial" in judge(make_used(training=1, gpus=1.0, gpu_percent=30.0)).remedy
    assert judge(make_used(training=1, gpus=1.0, gpu_percent=70.0)).remedy == ""


def test_parts_are_combined_by_their_time():
    parts = [
        make_used(start_up=1, training=1, cpu_percent=50.0, memory_mb=900.0),
        make_used(training=6, cpu_percent=90.0, memory_mb=700.0, gpu_percent=20.0),
    ]
    whole = combine(parts)
    assert whole.seconds == {"start_up": 1, "data": 0, "training": 7, "validation": 0, "report": 0}
    assert whole.cpu_percent == pytest.approx((2 * 50 + 6 * 90) / 8)
    assert (whole.memory_mb, whole.gpu_percent, whole.gpu_power_w) == (900.0, 20.0, None)


def test_time_that_the_worker_does_not_see_is_start_up_before_the_first_report_and_a_report_after_it():
    first, later = make_used(start_up=2, training=3).complete(9.0), make_used(training=3).complete(3.5)
    assert first.seconds["start_up"] == 6
    assert (later.seconds["start_up"], later.seconds["report"]) == (0, 0.5)
    assert make_used(training=3).complete(2.9).total_s == 3


def test_scalars_come_after_the_metrics_in_the_tab_and_leave_out_what_was_not_measured():
    scalars = make_used(data=1, training=3, cpu_percent=80.0).to_scalars()
    assert scalars["worker/cpu_percent"] == 80.0
    assert scalars["worker/data_percent"] == 25.0
    assert not [tag for tag in scalars if "gpu" in tag]
    assert min(scalars) > "work/seconds" > "val/"


def measure(number, used, **rest):
    return make_trial(number, {}, [3.0], utilisation=[EpochUtilisation(1, 1, used)], **rest)


def render(record):
    page = HtmlPage("x")
    add_utilisation_section(page, record)
    return page.render()


def test_the_section_has_a_row_and_a_verdict_for_each_trial():
    html = render(make_record([measure(0, BUSY), measure(7, CAUSES["starved by data"])]))
    assert "<td>starved by data</td>" in html
    assert html.count("<td>busy</td>") == 2  # among the verdicts, and in the row of the trial
    assert '<td class="number">7</td>' in html
    assert "GPU %" not in html


def test_of_many_trials_the_section_has_the_median_and_the_extremes_with_their_trials():
    trials = [measure(number, make_used(training=1, memory_mb=float(100 + number))) for number in range(101)]
    html = render(make_record(trials))
    cells = "".join(f'<td class="number">{value}</td>' for value in (150, 100, 0, 200, 100))
    assert f"<td>memory MB</td>{cells}" in html
    assert html.count("<tr>") < 20


def test_the_values_of_a_shared_gpu_are_labelled_as_those_of_the_whole():
    used = {"gpu_percent": 90.0, "gpu_memory_mb": 5e3}
    assert "whole GPU" not in render(make_record([measure(0, make_used(training=1, gpus=1.0, **used))]))
    html = render(make_record([measure(0, make_used(training=1, gpus=0.25, **used))]))
    assert "whole GPU %" in html
    assert "with all of its trials" in html


def test_a_sweep_without_measurements_has_neither_a_section_nor_a_finding():
    record = make_record([make_trial(0, {}, [3.0])])
    assert 'id="utilisation"' not in render(record)
    assert check_utilisation(record) == []


@pytest.mark.parametrize(
    ("verdict", "kind"),
    [("busy", "fine"), ("starved by data", "act"), ("starved by start-up", "act"), ("unknown", "open")],
)
def test_the_advice_says_what_slowed_the_trials_down(verdict, kind):
    (finding,) = check_utilisation(make_record([measure(0, CAUSES[verdict])]))
    assert finding.kind == kind
    assert finding.evidence.endswith("of the time of 1 trials")


def test_one_starved_trial_among_many_busy_ones_does_not_make_the_sweep_starved():
    trials = [measure(0, CAUSES["starved by data"]), *(measure(number, BUSY) for number in range(1, 10))]
    assert [finding.kind for finding in check_utilisation(make_record(trials))] == ["fine"]
