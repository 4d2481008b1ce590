"""Made columns for the tests of what is shown of a run, and its commands in this process."""

import sys
from collections.abc import Callable

import pytest

from serving import cli
from serving.simulation.columns import RunColumns
from tests.serving.simulation.made_runs import made_run as make


@pytest.fixture(scope="session")
def made_run() -> Callable[..., RunColumns]:
    """See made_runs.made_run."""
    return make


@pytest.fixture
def supernode(monkeypatch, capsys):
    """Runs the command in this process; gives exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["supernode", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run
