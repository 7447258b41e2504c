"""What the commands log: our own words, and of everything else only where it happened."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator

import pytest

from plinth.pipelines.console import say, show_error, show_table, start_logging, visible

NAME = "Mustermann^Erika"
Logged = Callable[[Callable[[], None]], str]


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Iterator[Logged]:
    """Runs something under the logging of a command; what it said on stderr."""
    root, ours = logging.getLogger(), logging.getLogger("plinth")
    before = (root.handlers[:], root.level, ours.level)

    def run(act: Callable[[], None]) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            start_logging(debug=False)
            act()
        return capsys.readouterr().err

    yield run
    root.handlers[:], level, own = before
    root.setLevel(level)
    ours.setLevel(own)


def fail(logger: str) -> None:
    try:
        raise ValueError(NAME)
    except ValueError:
        logging.getLogger(logger).exception("a job failed")


def test_a_librarys_warning_tells_the_place_and_not_the_text(logged: Logged) -> None:
    said = logged(lambda: warnings.warn(f"{NAME} is not a valid name", UserWarning, stacklevel=1))
    assert "UserWarning at pipelines/test_console.py:" in said
    assert NAME not in said


def test_a_librarys_log_tells_the_place_and_not_the_text(logged: Logged) -> None:
    said = logged(lambda: logging.getLogger("highjson").warning("Invalid value for PN: %r", NAME))
    assert "WARNING" in said
    assert "from highjson, test_console.py:" in said
    assert NAME not in said


@pytest.mark.parametrize("logger", ["plinth.jobs", "concurrent.futures"])
def test_an_exception_is_told_by_type_and_frames_and_not_by_its_text(
    logged: Logged, logger: str
) -> None:
    said = logged(lambda: fail(logger))
    assert "test_console.py" in said
    assert "ValueError" in said
    assert NAME not in said


def test_what_others_wrote_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = "a\x1b]0;owned\x07\u202egnp.exe\x9b31m\r[bold]b[/]"
    show_table("Paths", ("path",), [(text,)])
    show_error(text, hint=text)
    say(text)
    told = capsys.readouterr()
    for stream in (told.out, told.err):
        assert not set(stream) & set("\x1b\x07\x9b\u202e\r")
        assert "[bold]b[/]" in stream
    assert visible("plain, caf\u00e9\n\tnext") == "plain, caf\u00e9\n\tnext"
    assert visible("\x1b\u202e") == "\\x1b\\u202e"


def test_our_own_words_pass_unchanged(logged: Logged) -> None:
    said = logged(lambda: logging.getLogger("plinth.assembly").info("left out %s", "sensors"))
    assert "left out sensors" in said
