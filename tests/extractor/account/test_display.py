import io
import logging
import re
import time

import pytest
from rich.console import Console

from common.lake import Lake, create_lake
from common.logs import logger
from extractor.account.display import Display
from extractor.account.report import RunReport
from extractor.events import FileDone

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def lake(tmp_path) -> Lake:
    return create_lake(str(tmp_path / "lake"), 8)


@pytest.fixture
def report(lake) -> RunReport:
    """A run that began a hundred seconds ago; teacher a finished a file of 10 rows every two seconds, b a quarter."""
    begin = time.time() - 100
    moment = [begin]
    report = begun(lake, {"a": 60, "b": 60}, 2, moment)
    for file in range(40):
        moment[0] = begin + 2 * (file + 1)
        report.add(event("a", file, moment[0], model_seconds=0.5))
        if file % 4 == 3:
            report.add(event("b", file, moment[0], model_seconds=7.5, rejects={"image not decodable": 1}))
    moment[0] = begin + 80
    return report


def begun(lake, files: dict[str, int], prepare: int, moment: list[float]) -> RunReport:
    """A run of so many files of ten rows; ``moment`` is its clock."""
    rows = {name: 10 * count for name, count in files.items()}
    return RunReport(lake, "run-1", files, rows, 0, {}, workers={"prepare": prepare}, clock=lambda: moment[0])


def event(teacher: str, shard: int, finished: float, **more) -> FileDone:
    place = {"device": f"node/cuda:0/{'ab'.index(teacher)}", "started_at": finished - 1, "finished_at": finished}
    return FileDone(shard=shard, teacher=teacher, rows=10, prepare_seconds=0.2, **place, **more)


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="mmkd")
    return lambda: [record.getMessage() for record in caplog.records if record.getMessage().startswith("extract:")]


def not_a_terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def test_a_line_says_how_far_how_fast_how_long_and_what_is_slow(report):
    line = Display(report, console=not_a_terminal()).line()
    # 10 rows every 2 s and every 8 s; b has 500 rows to go.
    assert line == (
        "extract: 500/1200 rows (42 %), 6.2 rows/s, about 6 min 40 s left; 50/120 files; "
        "bottleneck teacher=b (94 % busy); rejects: 10 x image not decodable"
    )


def test_nothing_is_promised_before_every_teacher_has_finished_something(lake):
    report = RunReport(lake, "run-1", {"a": 2, "b": 2}, {"a": 20, "b": 20}, 0, {})
    display = Display(report, console=not_a_terminal())
    assert display.line() == "extract: 0/40 rows (0 %), nothing finished yet; 0/4 files; rejects: none"
    report.add(event("a", 0, time.time()))
    assert "left" not in display.line()


def test_a_teacher_at_its_first_shard_is_not_idle(lake):
    moment = [0.0]
    report = begun(lake, {"a": 4, "b": 2}, 1, moment)
    moment[0] = 100.0
    report.add(event("a", 0, 100.0, model_seconds=5.0))
    assert "bottleneck teacher=a (5 % busy)" in Display(report, console=not_a_terminal()).line()
    report.at_work = lambda: {"b": 90.0}
    assert "bottleneck teacher=b (90 % busy)" in Display(report, console=not_a_terminal()).line()
    moment[0] = 101.0
    report.add(event("b", 0, 101.0, model_seconds=91.0))
    report.at_work = dict
    (row,) = [stage for stage in report.stages() if stage.name == "teacher=b"]
    assert row.busy_share == pytest.approx(91 / 101)


def test_without_a_terminal_the_log_gets_a_first_line_early_and_then_at_its_pace(report, lines):
    with Display(report, every=0.2, console=not_a_terminal()) as display:
        display.show()
        assert lines() == []
        time.sleep(0.25)
        for _ in range(1000):
            display.show()
        assert len(lines()) == 1
        time.sleep(0.25)
        display.show()
    assert len(lines()) == 2
    assert "500/1200 rows" in lines()[1]
    assert re.search(r"CPU \d+ %", lines()[1])


def test_the_first_line_does_not_wait_for_the_whole_pace(report):
    display = Display(report, every=3600, console=not_a_terminal())
    assert display._next_line - time.monotonic() <= 5


def test_the_report_on_disk_is_brought_up_to_date_when_it_is_due(lake, report):
    display = Display(report, console=not_a_terminal())
    display.show()
    assert lake.storage.list_folders("runs") == []
    display._next_save = time.monotonic()
    display.show()
    deadline = time.monotonic() + 30
    while not lake.storage.exists("runs/run-1/report.md") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lake.storage.read_json("runs/run-1/report.json")["rows"]["done"] == 500
    assert lake.storage.list_files("runs/run-1") == ["report.json", "report.md"]


def test_on_a_terminal_a_table_is_drawn_and_the_log_goes_above_it(report):
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=110, height=40)
    handler = logging.StreamHandler(plain := io.StringIO())
    gone = logging.StreamHandler(io.StringIO())  # as one that an earlier command of this process leaves
    gone.stream.close()
    logger.addHandler(gone)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    report.note("restart", "actor 3 died")
    try:
        with Display(report, console=console) as display:
            display.show()
            logger.info("a line of the log")
            report.add(event("b", 50, time.time()))
        logger.info("after the table")
    finally:
        logger.removeHandler(handler)
        logger.removeHandler(gone)
    text = ESCAPES.sub("", drawn.getvalue())
    assert "a line of the log" in text
    assert plain.getvalue() == "after the table\n"
    last = text[text.rindex("mmkd extract, run run-1") :]
    assert re.search(r"teacher=b\s+<- bottleneck │ 11/60 │ 110/600", last)
    assert re.search(r"teacher=a\s+│ 40/60 │ 400/600 │\s+5 │\s+40 s │ 25 %", last)
    assert re.search(r"CPU \d+ %", last)
    assert "rejects: 10 x image not decodable" in last
    assert "restart 1" in last


def test_reasons_cannot_write_to_the_terminal(report):
    report.add(event("a", 59, time.time(), rejects={"[bold]x[/]\x1b[31m\nbell\x07": 99}))
    drawn = io.StringIO()
    with Display(report, console=Console(file=drawn, force_terminal=True, width=200, color_system=None)):
        pass
    assert "99 x [bold]x[/]?[31m bell?" in ESCAPES.sub("", drawn.getvalue())
    assert "\x07" not in drawn.getvalue()
    assert "\x1b[31m" not in drawn.getvalue()


def test_a_display_that_breaks_is_off_and_the_run_goes_on(report, caplog):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "the terminal is gone")

    with Display(report, console=Console(file=Closed(), force_terminal=True)) as display:
        for _ in range(3):
            display.show()
    assert caplog.text.count("the progress display failed and is off") == 1
