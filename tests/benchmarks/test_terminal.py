"""Test progress and tables, on a terminal and in a file."""

import io
import sys

import pytest
from rich.console import Console

from benchmarks.harness import terminal


@pytest.fixture
def console(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(terminal, "find_console", lambda: console)
    return console


def test_progress_and_table_on_a_terminal(console):
    with terminal.progress(3, estimate=True) as begin:
        begin("[first]")
        begin("second")
    terminal.print_table(["name", "value"], [["a", "1.5"]])
    shown = console.file.getvalue()
    assert "3/3" in shown
    assert "left" in shown
    assert "│ a    │   1.5 │" in shown


def test_progress_and_table_in_a_file(capsys):
    with terminal.progress(2) as begin:
        begin("first")
        begin("second")
    terminal.print_table(["name", "value"], [["a", "1.5"], ["long name", "10.25"]])
    out, err = capsys.readouterr()
    assert err == "1/2 first\n2/2 second\n"
    assert out == "name       value\na            1.5\nlong name  10.25\n"


def test_without_rich_a_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(terminal.find_console(), Console)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert terminal.find_console() is None
