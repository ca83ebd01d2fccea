"""The page: whole, self-contained, and proof against what a trial's error may hold."""

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from handpose.report import sections
from handpose.report.advice import give_advice
from handpose.report.html import BLOCKS, HtmlPage
from handpose.report.sections import add_comparison_section, add_sweep_sections, format_status
from handpose.report.sweep_record import Candidate, Confirmation, HandPicture, Interval, RetrainedWinner, StoryLine
from tests.report.fabricated_records import DEPTH, RATE, make_record, make_swept_record, make_trial

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Tree(HTMLParser):
    """Checks that elements close in order, and keeps what stands where."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.text, self.attributes = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def render_page(made, **rest):
    page = HtmlPage("a sweep")
    page.add_header("A sweep", format_status(made))
    add_sweep_sections(page, made, give_advice(made), **{"shown": [], "next_space": None, "isolation": None} | rest)
    return page.render()


def remove_plotly(text):
    """What is ours: plotly.js names many addresses, and asks for none of them."""
    scripts = re.findall(r"<script>.*?</script>", text, re.DOTALL)
    return text.replace(max(scripts, key=len), "")


def test_the_page_is_whole_and_names_no_address():
    made = make_swept_record(lambda params: params["optimizer.lr"], [RATE, DEPTH], num_trials=25)
    text = render_page(made, next_space="optimizer.lr: 1\n")
    assert not re.search(r"https?://|src=\"(?!data:)|@import|url\(", remove_plotly(text))
    tree = Tree(remove_plotly(text))
    assert {f"trial-{number}" for number in range(25)} <= set(tree.ids)
    assert len(tree.ids) == len(set(tree.ids))
    targets = [value[1:] for name, value in tree.attributes if name == "href"]
    assert set(targets) <= set(tree.ids)


def test_every_chart_has_its_data_and_says_what_it_shows():
    text = render_page(make_swept_record(lambda params: params["optimizer.lr"], [RATE, DEPTH], num_trials=25))
    kept = find_figures(text)
    charts = re.findall(r'data-figure="(\d+)".*?aria-label="([^"]+)"></div><figcaption>([^<]+)<', text)
    assert [int(number) for number, _, _ in charts] == list(range(len(json.loads(kept))))
    assert all(said == caption and len(said) > 20 for _, said, caption in charts)


@pytest.mark.parametrize(
    "nasty",
    [
        '</script><script>alert("1")</script><b>&',
        "<!--<script>",
        '" onmouseover="alert(1)" x="',
        "' onmouseover='alert(1)' x='",
        "--></style><img src=x onerror=alert(1)>",
    ],
)
def test_what_a_trial_says_is_text(nasty):
    trials = [
        make_trial(0, {"model.name": nasty}, [3.0], state="failed", error=nasty),
        make_trial(1, {"model.name": "a"}, [1.0] * 4),
    ]
    text = remove_plotly(
        render_page(make_record(trials, name=nasty, configuration={"x": nasty}, origin={"command_line": nasty}))
    )
    assert "<script>alert" not in text
    tree = Tree(text)
    assert nasty in tree.text
    assert not [name for name, _ in tree.attributes if name.startswith("on")]
    assert "<" not in find_figures(text)


def find_figures(text):
    return re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)[1]


def test_only_the_scripts_of_the_page_may_run():
    text = render_page(make_record([]))
    (policy,) = [value for name, value in Tree(remove_plotly(text)).attributes if name == "content" and "-src" in value]
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    ]
    assert len(hashes) == 2
    assert sorted(rules["script-src"]) == sorted(hashes)
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == ["'none'"]


def test_a_sweep_without_a_single_trial_has_a_page():
    assert "No trial has given a finite value yet." in render_page(make_record([]))


def test_a_winner_that_was_not_confirmed_is_called_optimistic():
    assert "optimistic" in render_page(make_swept_record(lambda params: 1.0, [RATE], num_trials=3))


def test_pictures_are_in_the_page():
    hands = [HandPicture("worst", "00000012", 31.4, b"picture")]
    text = render_page(
        make_record([make_trial(0, {}, [1.0] * 4)], retrained=RetrainedWinner({"test/pa_mpjpe_mm": 12.0}, hands))
    )
    assert f"data:image/jpeg;base64,{base64.b64encode(b'picture').decode()}" in text
    assert "00000012, 31.4 mm" in text


def read_stories(text):
    return json.loads(re.search(r'<script type="application/json" id="stories">(.*?)</script>', text, re.DOTALL)[1])


def test_the_number_of_a_trial_is_a_button_that_shows_its_story():
    story = [StoryLine(5.0, "started on node a"), StoryLine(3700.0, "</script>stopped")]
    trials = [make_trial(3, {}, [1.0] * 4, story=story, reason="worse than <the> cutoff"), make_trial(4, {}, [2.0])]
    text = remove_plotly(render_page(make_record(trials)))
    assert read_stories(text) == {
        "trial-3": [["0:05", "started on node a"], ["1:01:40", "</script>stopped"]],
        "trial-4": [],
    }
    tree = Tree(text)
    assert [value for name, value in tree.attributes if name == "data-story"] == ["trial-3", "trial-4"]
    assert "worse than <the> cutoff" in tree.text


def test_a_page_about_very_many_trials_has_the_stories_of_the_best(monkeypatch):
    monkeypatch.setattr(sections, "_MAX_STORIES", 2)
    trials = [make_trial(number, {}, [10.0 - number] * 4) for number in range(4)]
    text = render_page(make_record(trials))
    assert list(read_stories(text)) == ["trial-3", "trial-2"]
    assert re.findall(r'data-story="([^"]*)"', remove_plotly(text)) == ["trial-3", "trial-2"]


def test_two_sweeps_share_no_identifier():
    one, two = (
        make_swept_record(lambda params: params["optimizer.lr"], [RATE], num_trials=20, seed=seed) for seed in (0, 1)
    )
    page = HtmlPage("both")
    page.add_header("both", "")
    add_comparison_section(page, [one, two])
    for place, made in enumerate((one, two)):
        page.start_sweep(made.name, f"sweep-{place}-", format_status(made))
        add_sweep_sections(page, made, give_advice(made), shown=[], next_space=None, isolation=None)
    tree = Tree(remove_plotly(page.render()))
    assert len(tree.ids) == len(set(tree.ids))
    assert {"sweep-0-trial-3", "sweep-1-trial-3"} <= set(tree.ids)
    assert {"sweep-0-trial-3", "sweep-1-trial-3"} <= set(read_stories(page.render()))
    assert [value for name, value in tree.attributes if name == "href"] == [
        "#comparison",
        "#sweep-0-sweep",
        "#sweep-1-sweep",
    ]


def test_cells_are_escaped_but_for_markup():
    assert "<td>&lt;i&gt;</td>" in BLOCKS.table(["a"], [["<i>"]])
    assert 'alt="&lt;i&gt;"' in BLOCKS.pictures([(b"", "<i>")])


def test_each_candidate_has_its_verdict_against_the_winner():
    def candidate(label, mean, between, is_distinguishable):
        difference = None if between is None else Interval(between, between - 0.5, between + 0.5)
        at = Interval(mean, mean - 0.4, mean + 0.4)
        return Candidate(label, None, {}, {1: mean, 2: mean}, at, difference, is_distinguishable)

    winner = candidate("trial 1", 9.0, None, None)
    others = [
        candidate("trial 2", 9.2, 0.2, False),
        candidate("trial 3", 12.0, 3.0, True),
        candidate("default", 7.0, -2.0, True),
    ]
    confirmation = Confirmation(4, [1, 2], [winner, *others], winner, None, "a method")
    text = render_page(make_record([make_trial(1, {}, [9.0]), make_trial(2, {}, [9.2])], confirmation=confirmation))
    rows = re.findall(r"<tr><td>(trial \d|default)</td>.*?<td[^>]*>([^<]*)</td></tr>", text)
    assert rows == [
        ("trial 1", "winner"),
        ("trial 2", "not distinguishable from the winner"),
        ("trial 3", "worse"),
        ("default", "better, but it cannot win"),
    ]


def test_a_page_says_what_a_confirmation_with_one_seed_does_not_show():
    at = Interval(9.0, math.nan, math.nan)
    winner, other = (Candidate(f"trial {number}", number, {}, {1: 9.0}, at, None, None) for number in (1, 2))
    other = replace(other, difference=at)
    unknown = {"not_distinguishable_from": "one seed", "gain_over_default": "the default is out"}
    confirmation = Confirmation(4, [1], [winner, other], winner, None, "a method", unknown=unknown)
    text = render_page(make_record([make_trial(1, {}, [9.0]), make_trial(2, {}, [9.2])], confirmation=confirmation))
    assert "Whether it is better than the others is unknown: one seed." in text
    assert "The gain over the default configuration is unknown: the default is out." in text
    assert re.findall(r"<tr><td>trial 2</td>.*?<td[^>]*>([^<]*)</td></tr>", text) == ["unknown"]
    assert "too good on average, here by" not in text
    doubtful = render_page(make_record([make_trial(1, {}, [9.0])], confirmation=replace(confirmation, optimism=0.123)))
    assert "too good on average, here by about PA-MPJPE 0.12 mm" in doubtful
