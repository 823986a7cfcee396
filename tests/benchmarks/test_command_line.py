"""The beginning and the end of benchmark programs."""

import argparse

import pytest

from benchmarks import adapt, command_line
from crossdock.errors import BadConfig


def test_errors_of_users_are_one_line_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    @command_line.one_line_errors
    def main(number: int, *, fails: bool) -> int:
        if fails:
            raise BadConfig(f"{number} ranks; choose fewer")
        return number

    assert main(3, fails=False) == 3
    assert main(3, fails=True) == 78
    assert capsys.readouterr().err == "3 ranks; choose fewer\n"


def test_other_errors_are_bugs() -> None:
    @command_line.one_line_errors
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()


def test_a_program_without_emulated_hosts_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: object) -> None:
        raise BadConfig("no emulated hosts")

    monkeypatch.setattr(adapt, "Lab", refused)
    assert adapt.main(["--short"]) == 78
    assert capsys.readouterr().err == "no emulated hosts\n"


def test_the_common_options() -> None:
    options = command_line.parser("What it is.", 9, "3 rounds").parse_args(["--short", "--out", "x.json"])
    assert options == argparse.Namespace(repeats=9, out=options.out, json=False, short=True)
    assert options.out.name == "x.json"
