"""Print why a trial is where it is: who proposed it, what was decided about it, when, where and why.

    python -m handpose.sweep.why outputs/sweeps/NAME 17

It reads the events of the sweep and changes nothing. It imports neither torch nor Ray, so that it answers at once.
"""

from collections.abc import Sequence

from handpose.errors import UserError
from handpose.program import exit_on_user_error, make_parser
from handpose.report.formatting import format_duration
from handpose.report.sweep_record import StoryLine
from handpose.sweep.analysis.story import StoryEvents, tell_story
from handpose.sweep.record.events import EVENTS_FILE, read_events
from handpose.sweep.storage.stored_sweep import open_sweep_for_reading
from handpose.utf8 import use_utf8
from handpose.yaml_files import read_yaml

_DESCRIPTION = """\
Tell the story of a trial: where its parameters come from, each decision about it with the numbers that were compared,
its failures and retries, its nodes and its end. The sweep may be running, stopped or in an object store. Times are
hours, minutes and seconds of the sweep's own time, which does not advance while no process runs the sweep.

  python -m handpose.sweep.why outputs/sweeps/NAME 17
  python -m handpose.sweep.why s3://bucket/folder/NAME 17
"""


def tell_story_of(place: str, trial: int) -> list[StoryLine]:
    """Tell the story of a trial.

    Args:
        place: folder or URL of the sweep.
        trial: number of the trial.

    Raises:
        UserError: there is no such sweep or trial, or the events are damaged.
    """
    with open_sweep_for_reading(place) as folder:
        config = read_yaml(folder / "sweep.yaml").get("config")
        if not isinstance(config, dict) or not isinstance(config.get("sweep"), dict):
            raise UserError(f"{place} has no sweep: sweep.yaml is missing or incomplete; give the folder of a sweep")
        stories = StoryEvents()
        for event in read_events(folder / EVENTS_FILE):
            stories.add(event)
    if not stories.get(trial):
        numbers = stories.list_trials()
        has = f"its trials are {numbers[0]} to {numbers[-1]}" if numbers else "it has not started a trial yet"
        raise UserError(f"{place} has no trial {trial}; {has}")
    return tell_story(stories.get(trial), config["sweep"]["metric"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Raises:
        SystemExit: with status 2, if an argument is wrong.
    """
    parser = make_parser("handpose.sweep.why", _DESCRIPTION)
    parser.add_argument("place", metavar="DIR", help="folder of the sweep, or its URL in an object store")
    parser.add_argument("trial", type=int, metavar="TRIAL", help="number of the trial, as in trials.csv")
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        story = tell_story_of(options.place, options.trial)
        print(f"trial {options.trial} of {options.place}")
        for line in story:
            print(f"{format_duration(line.at_s):>9}  {line.text}")
    return 0


if __name__ == "__main__":
    use_utf8()
    raise SystemExit(main())
