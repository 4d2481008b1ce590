"""Published rows and estimates made by hand."""

import sys
import types

import pytest
import yaml

from serving import cli
from serving.estimation.published import PublishedRow, PublishedRows


def make_row(**changes):
    """A calibration row of the estimate `line`, value `y`, at x = 1; `arguments` replaces that x."""
    arguments = changes.pop("arguments", {"x": 1})
    ours = {"estimate": "line", "key": "y", "with": arguments} | changes.pop("ours", {})
    fields = {
        "group": "lines",
        "row": "one",
        "quantity": "height",
        "unit": "m",
        "published": 2.0,
        "role": "calibration",
        "source": "a ruler",
    }
    return PublishedRow.model_validate({**fields, "ours": ours, **changes})


@pytest.fixture(scope="session")
def published_row():
    """See make_row."""
    return make_row


@pytest.fixture(scope="session")
def published_rows():
    """A function: some rows as a file about the device `ruler` holds them."""
    return lambda *rows: PublishedRows(hardware="ruler", rows=rows)


@pytest.fixture
def supernode(monkeypatch, capsys):
    """A function: run a verb in this process with these estimates; gives exit code, standard output and error."""

    def run(estimates, *arguments):
        module = types.ModuleType("serving.estimation.estimates")
        module.ESTIMATES = estimates
        monkeypatch.setitem(sys.modules, "serving.estimation.estimates", module)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["supernode", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def rows_file(tmp_path):
    """A function: write rows about `ruler` to a file; gives its path."""

    def write(*rows):
        path = tmp_path / "rows.yaml"
        raw = [row.model_dump(by_alias=True, exclude_none=True) for row in rows]
        path.write_text(yaml.safe_dump({"hardware": "ruler", "rows": raw}))
        return path

    return write
