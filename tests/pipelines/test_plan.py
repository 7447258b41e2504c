"""``plinth plan``: lanes for a load, from costs, in virtual time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from plinth.engine import ConfigError, LatencyModel
from plinth.pipelines.cli.main import app
from plinth.pipelines.plan.demand import (
    CostFile,
    Costs,
    Patient,
    parse_lanes,
    parse_patient,
    read_costs,
    read_outside,
    read_trace,
)
from plinth.pipelines.plan.planner import Question, plan

URGENT = Costs(seconds={1: 0.021, 128: 0.148})
STUDY = Costs(seconds={1: 0.010, 8: 0.080}, rows=100)
TABLE = """\
[urgent]
seconds = { 1 = 0.021, 128 = 0.148 }
[background]
rows = 100
seconds = { 1 = 0.010, 8 = 0.080 }
"""


def question(rate: float = 300.0, **more) -> Question:
    return Question(CostFile(urgent=URGENT), 0.2, rate, seconds=4.0, **more)


def test_a_lane_is_needed_for_as_much_as_one_can_do_and_two_for_more():
    """A lane does 865 rows a second in full batches, and 600 within 200 ms without a refusal."""
    assert plan(question(600.0), range(1, 3)).needed == 1
    found = plan(question(1100.0), range(1, 4))
    assert found.needed == 2
    one, two, _ = found.points
    assert one.in_time < 0.9 < two.in_time
    assert one.refused == pytest.approx(1 - one.in_time)
    assert two.p50 <= two.p99 <= two.p999 <= 200
    assert 0.5 < two.busy <= 1


def test_what_requests_take_beside_their_batches_is_added_to_each():
    found = plan(question(), [1]).points[0]
    costs = CostFile(urgent=URGENT.model_copy(update={"outside": (0.010, 0.010)}))
    later = plan(Question(costs, 0.2, 300.0, seconds=4.0), [1]).points[0]
    for name in ("p50", "p99", "p999"):
        assert getattr(later, name) == pytest.approx(getattr(found, name) + 10)
    late = CostFile(urgent=URGENT.model_copy(update={"outside": (0.0, 0.2)}))
    half = plan(Question(late, 0.2, 300.0, seconds=4.0), [1]).points[0]
    assert half.in_time == pytest.approx(0.5, abs=0.05)
    assert half.refused == found.refused


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "does not say"),
        ('{"outside_by_engine_ms": []}', "does not say"),
        ('{"outside_by_engine_ms": ["x"]}', "no result of a benchmark"),
        ('{"outside_by_engine_ms": [NaN]}', "does not say"),
        ("[", "no result of a benchmark"),
    ],
)
def test_a_benchmark_that_says_nothing_of_that_is_refused(tmp_path, text, problem):
    file = tmp_path / "run.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_outside(file)
    file.write_text(
        '{"runs": [{"outside_by_engine_ms": []}, {"load": {"outside_by_engine_ms": [5.0, 7.5]}}]}'
    )
    assert read_outside(file) == (0.005, 0.0075)


def test_background_work_takes_the_time_that_requests_leave():
    """100 rows of 10 ms each: an idle lane does a study a second, 28,800 in a night of 8 hours."""
    costs = CostFile(urgent=URGENT, background=STUDY)
    asked = Patient(10_000, 8 * 3600, "studies")
    made = Question(costs, 0.2, 50.0, patient=asked, seconds=8.0)
    (alone,) = plan(made, [1]).points
    assert alone.in_time > 0.99
    assert alone.jobs_possible is not None
    assert 5_000 < alone.jobs_possible < 28_800
    two = plan(made, [1, 2]).points[1]
    assert two.jobs == 10_000
    assert two.jobs_possible is not None
    assert two.jobs_possible > 1.9 * alone.jobs_possible


@pytest.mark.parametrize(("at_once", "between", "a_second"), [(1, 1.0, 0.5), (2, 1.0, 0.8)])
def test_studies_in_work_at_a_time_leave_the_lane_idle_between_them(at_once, between, a_second):
    """A study is a second of the lane: one at a time does one in two seconds, two mostly wait."""
    study = STUDY.model_copy(update={"at_once": at_once, "between": between})
    costs = CostFile(urgent=Costs(seconds={1: 0.0001}), background=study)
    made = Question(costs, 0.2, 1.0, patient=Patient(1.0, 1.0, "studies"), seconds=60.0)
    assert plan(made, [1]).points[0].jobs_possible == pytest.approx(a_second, rel=0.15)


def test_separate_pools_are_what_each_kind_of_work_takes_alone():
    costs = CostFile(urgent=URGENT, background=STUDY)
    asked = Patient(30_000, 8 * 3600, "studies")
    found = plan(Question(costs, 0.2, 20.0, patient=asked, seconds=4.0), range(1, 5))
    assert found.separate == (1, 2), "30,000 studies a night are more than a lane can do"
    assert found.needed is not None
    assert found.saved == 1 - found.needed / 3


def test_nothing_holds_what_is_too_much():
    assert plan(question(5_000.0), [1, 2]).needed is None


@pytest.mark.parametrize(
    ("text", "patient"),
    [
        ("300 studies/night", Patient(300, 28_800, "studies")),
        ("1,200/hour", Patient(1200, 3600, "jobs")),
        ("2.5 scans / minute", Patient(2.5, 60, "scans")),
    ],
)
def test_background_work_is_a_number_and_a_period(text, patient):
    assert parse_patient(text, 8) == patient


@pytest.mark.parametrize("text", ["many", "300 studies", "300/fortnight", "", "-3/hour"])
def test_what_is_no_number_and_period_is_refused(text):
    with pytest.raises(ConfigError, match="expected a number and a period"):
        parse_patient(text, 8)


def test_lanes_are_a_number_or_a_range():
    assert (list(parse_lanes("4")), list(parse_lanes("2..4"))) == ([4], [2, 3, 4])
    for text in ("0", "5..2", "x", "1..99999", "1-4"):
        with pytest.raises(ConfigError, match="expected 1 to 10000"):
            parse_lanes(text)


def test_a_trace_is_arrival_times_and_names_the_line_that_is_none(tmp_path: Path):
    file = tmp_path / "arrivals.csv"
    file.write_text("seconds,who\n10.0,a\n10.5,b\n12,c\n")
    assert read_trace(file).tolist() == [0.0, 0.5, 2.0]
    for text, said in (
        ("1\nx\n", ":2: 'x' is not"),
        ("2\n1\n", ":2: 1 comes before"),
        ("1\n", "1 arr"),
        ("1" * 200_000, "field larger than"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_trace(file)


def test_costs_that_an_engine_measured_are_read_by_model(tmp_path: Path):
    latency = LatencyModel(tmp_path / "latency.json")
    for model in ("fraud@1#a/cpu", "nodules@2#b/cpu"):
        for rows in (1, 8):
            latency.seed(model, rows, 0.01 * rows)
    latency.observe("fraud@1#a/cpu", 1, 0.013)
    latency.turned("fraud@1#a/cpu", 0.002)
    latency.followed("fraud@1#a/cpu", 0.003)
    latency.save()
    read = read_costs(latency.path, "fraud", "nodules", 400)
    assert set(read.urgent.seconds) == {1, 8}
    assert len(read.urgent.delays) == 1
    assert (read.urgent.turns, read.urgent.followed) == ((0.002,), (0.003,))
    assert read.background is not None
    assert (read.background.rows, read.background.turns) == (400, (0.0,))
    with pytest.raises(ConfigError, match="no costs of froud"):
        read_costs(latency.path, "froud", None, None)
    with pytest.raises(ConfigError, match="2 batch keys of one model"):
        read_costs(latency.path, None, None, None)


def test_a_table_with_an_unknown_key_is_refused_with_its_line(tmp_path: Path):
    file = tmp_path / "costs.toml"
    file.write_text("[urgent]\nsecond = { 1 = 0.1 }\n")
    with pytest.raises(ConfigError, match=r"costs\.toml:2"):
        read_costs(file, None, None, None)


def test_the_command_prints_a_table_json_and_a_picture(tmp_path: Path):
    file, picture = tmp_path / "costs.toml", tmp_path / "plan.png"
    file.write_text(TABLE)
    words = ["plan", "--rate", "100", "--deadline", "200", "--background", "100 studies/night"]
    words += ["--costs", str(file), "--lanes", "1..2", "--seconds", "2"]
    shown = CliRunner().invoke(app, [*words, "--plot", str(picture)])
    assert shown.exit_code == 0, shown.output
    assert "1 lane holds 100/s within 200 ms and 100 studies" in shown.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert (told["lanes_needed"], len(told["points"])) == (1, 2)
    words[2] = "50000"
    assert CliRunner().invoke(app, words).exit_code == 1


def test_what_cannot_be_planned_is_said_before_anything_runs(tmp_path: Path):
    words = ["plan", "--deadline", "200"]
    found = CliRunner().invoke(app, words)
    assert isinstance(found.exception, ConfigError)
    assert "expected one of them" in str(found.exception)
    file = tmp_path / "costs.toml"
    file.write_text("[urgent]\nseconds = { 1 = 0.1 }\n")
    words += ["--rate", "1", "--costs", str(file), "--background", "1/night"]
    found = CliRunner().invoke(app, words)
    assert "no costs of background work" in str(found.exception)


def test_what_requests_take_outside_goes_with_their_time_in_the_engine():
    ordered = tuple([0.001] * 99 + [0.050])
    asked = [(ordered, 45.0, 90.0), (tuple(reversed(ordered)), 1.0, 40.0)]
    for outside, low, high in asked:
        costs = CostFile(urgent=URGENT.model_copy(update={"outside": outside}))
        made = Question(costs, 0.2, 20.0, seconds=40.0)
        alone = plan(Question(CostFile(urgent=URGENT), 0.2, 20.0, seconds=40.0), [1]).points[0]
        found = plan(made, [1]).points[0]
        assert low <= found.p999 - alone.p999 <= high


def test_requests_that_ask_a_second_time_wait_for_a_second_batch():
    urgent = Costs(seconds={1: 0.010, 4: 0.040}, again=1.0, again_rows=6, outside=(0.004,))
    found = plan(Question(CostFile(urgent=urgent), 0.2, 0.5, seconds=60.0), [1]).points[0]
    assert found.p50 == pytest.approx(10 + 40 + 20 + 4), "six rows are two batches"
    soon = urgent.model_copy(update={"followed": (0.001,), "outside": (0.400,), "again_rows": 1})
    shown = plan(Question(CostFile(urgent=soon), 0.2, 0.5, seconds=60.0), [1]).points[0]
    assert shown.refused == 0, "its second batch is done 21 ms after it came"
    some = urgent.model_copy(update={"again": 0.02})
    shown = plan(Question(CostFile(urgent=some), 0.2, 0.5, seconds=600.0), [1]).points[0]
    assert (shown.p50, shown.p99) == pytest.approx((14.0, 74.0))


def test_a_lane_takes_a_moment_from_the_end_of_a_batch_to_the_next():
    urgent = Costs(seconds={1: 0.010, 4: 0.040}, again=1.0)
    slow = urgent.model_copy(update={"turns": (0.005,)})
    shown = plan(Question(CostFile(urgent=slow), 0.2, 0.5, seconds=60.0), [1]).points[0]
    assert shown.p50 == pytest.approx(10 + 5 + 10), "its second batch begins after the first"

    def rows(costs: Costs) -> float:
        asked = Question(CostFile(urgent=urgent, background=costs), 0.2, 1.0, seconds=30.0)
        asked = replace(asked, patient=Patient(10.0, 1.0, "studies"))
        return plan(asked, [1]).points[0].jobs_possible

    patient = Costs(seconds={1: 0.010}, rows=1)
    assert rows(patient.model_copy(update={"turns": (0.010,)})) < 0.52 * rows(patient)
