"""utilisation.jsonl: what is written is read, and damage costs only the lines that it hits."""

from handpose.report.utilisation import PHASES, EpochUtilisation, Utilisation
from handpose.sweep.record.utilisation_file import append_utilisation, read_utilisation

SECONDS = dict(zip(PHASES, (1.0, 2.0, 3.0, 4.0, 0.5), strict=True))
MEASURED = [
    (3, EpochUtilisation(1, 1, Utilisation(SECONDS, 90.0, 800.5, 0.25, 40.0, 3000.0, 120.0))),
    (0, EpochUtilisation(1, 1, Utilisation(SECONDS, cpu_percent=70.0, memory_mb=500.0))),
    (3, EpochUtilisation(2, 2, Utilisation(SECONDS, gpus=1.0))),
]


def test_what_is_written_is_read_trial_by_trial(tmp_path):
    file = tmp_path / "utilisation.jsonl"
    for trial, each in MEASURED:
        append_utilisation(file, trial, each)
    assert read_utilisation(file) == {3: [MEASURED[0][1], MEASURED[2][1]], 0: [MEASURED[1][1]]}


def test_a_sweep_without_the_file_has_measured_nothing(tmp_path):
    assert read_utilisation(tmp_path / "utilisation.jsonl") == {}


def test_a_line_that_a_crash_has_cut_is_left_out(tmp_path):
    file = tmp_path / "utilisation.jsonl"
    append_utilisation(file, 0, MEASURED[0][1])
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:40] + b"\n[1]\n\xff\n" + whole)
    assert read_utilisation(file) == {0: [MEASURED[0][1]] * 2}


def test_a_field_of_a_later_version_is_ignored(tmp_path):
    file = tmp_path / "utilisation.jsonl"
    append_utilisation(file, 0, MEASURED[0][1])
    file.write_text(file.read_text().replace("{", '{"disk_mb": 3, ', 1))
    assert read_utilisation(file) == {0: [MEASURED[0][1]]}
