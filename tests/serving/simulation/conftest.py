"""Made columns for the tests of what is shown of a run."""

from collections.abc import Callable

import pytest

from serving.simulation.columns import RunColumns
from tests.serving.simulation.made_runs import made_run as make


@pytest.fixture(scope="session")
def made_run() -> Callable[..., RunColumns]:
    """See made_runs.made_run."""
    return make
