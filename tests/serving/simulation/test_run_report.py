"""The report of a run: one file that needs nothing else, whose plots hold what the columns say."""

import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects
import pytest

from serving.config import RunConfig
from serving.records import Goodput
from serving.simulation.columns import RequestColumns, RunColumns
from serving.simulation.figures import summarize_columns
from serving.simulation.latencies import phases_of
from serving.simulation.plots import MOST_LINES, log_axis, numbers, scaled_bytes
from serving.simulation.report import report_html, write_report
from serving.workloads.synthetic import synthetic_workload
from serving.workloads.workload import Workload

MakeRun = Callable[..., RunColumns]
MakeConfig = Callable[..., RunConfig]
LOADING = {"src", "href", "data", "action", "poster", "srcset"}


class Page(HTMLParser):
    """What a browser would see: figures, text, and attributes that load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: dict[str, Any] = {}
        self.loads: list[str] = []
        self.words: list[str] = []
        self._target: str | None = None
        self._hidden = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in LOADING]
        self._hidden = tag in ("script", "style")
        self._target = dict(attrs).get("data-target")

    def handle_data(self, data: str) -> None:
        if self._target is not None:
            self.figures[self._target] = json.loads(data)
            self._target = None
        elif not self._hidden:
            self.words.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def trace(self, figure: str, name: str) -> Any:
        return next(trace for trace in self.figures[figure]["data"] if trace["name"] == name)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return synthetic_workload(num_requests=3, input_len=20, output_len=4, name="made & drawn")


@pytest.fixture(scope="module")
def show(make_config: MakeConfig, workload: Workload) -> Callable[..., Page]:
    """A function: the page of a run."""

    def page(run: RunColumns, *, shape: str = "disaggregated", **more: Any) -> Page:
        return Page(report_html(make_config(shape), workload, run, **more))

    return page


def test_a_report_loads_nothing_and_stays_small(
    made_run: MakeRun, make_config: MakeConfig, workload: Workload, tmp_path: Path
) -> None:
    path = tmp_path / "run.html"
    write_report(make_config("disaggregated"), workload, made_run(3_000), path, name="</script><b>")
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 8e6
    page = Page(text)
    assert page.loads == []
    assert "@import" not in text.partition("<body>")[0]
    assert "</script><b>: 3,000 requests" in page.text  # as text, not as tags


def test_every_figure_is_one_that_plotly_knows(made_run: MakeRun, show: Callable[..., Page]) -> None:
    page = show(made_run(200))  # in which nobody waits at an instance
    assert len(page.figures) == 20
    for figure in page.figures.values():
        plotly.graph_objects.Figure(figure)  # raises on a property that does not exist


def test_no_line_grows_with_the_run(made_run: MakeRun, show: Callable[..., Page]) -> None:
    page = show(made_run(20_000, num_prefill=MOST_LINES + 1, rate_per_s=40))
    points = {key: max(len(t.get("x", [])) for t in figure["data"]) for key, figure in page.figures.items()}
    assert max(size for key, size in points.items() if key != "ttft-prompt") <= 300
    assert points["ttft-prompt"] <= 3_000
    names = [trace["name"] for trace in page.figures["step-tokens"]["data"]]
    assert names == [f"prefill, mean of {MOST_LINES + 1}", "prefill, lowest", "prefill, highest"]


def test_plots_hold_what_the_columns_say(made_run: MakeRun, show: Callable[..., Page]) -> None:
    run = made_run(400)
    page = show(run)
    tokens, requests = page.figures["tokens"]["data"], page.figures["requests"]["data"]
    width_s = tokens[0]["x"][1] - tokens[0]["x"][0]
    assert sum(tokens[0]["y"]) * width_s == pytest.approx(run.requests.num_prompt_tokens.sum(), rel=1e-4)
    assert sum(tokens[1]["y"]) * width_s == pytest.approx(run.requests.num_output_tokens.sum(), rel=1e-4)
    assert [round(sum(trace["y"]) * width_s) for trace in requests] == [400, 400]
    heat = page.figures["utilization"]["data"][0]
    width_ns = (heat["x"][1] - heat["x"][0]) * 1e9
    busy_ns = [sum(row) / 100 * width_ns for row in heat["z"]]
    assert busy_ns == pytest.approx([instance.busy_ns for instance in run.instances], rel=1e-3)
    ttft = page.trace("distribution", "TTFT")
    place = ttft["y"].index(0.5)
    assert ttft["x"][place] == pytest.approx(summarize_columns(run).simulated["ttft"].median_ms, rel=1e-5)
    bars = page.figures["breakdown"]["data"]
    for role in range(2):
        assert sum(bar["x"][role] for bar in bars) == pytest.approx(100, rel=1e-4)
    links = page.figures["token-flow"]["data"][0]["link"]["value"]
    assert sum(links) == run.requests.num_prompt_tokens.sum() + run.requests.num_output_tokens.sum()
    assert run.moves is not None
    assert sum(page.figures["byte-flow"]["data"][0]["link"]["value"]) == run.moves.num_bytes.sum()
    assert max(page.trace("pool", "used")["y"]) == pytest.approx(run.pool.used_bytes[-1] / 1e9, rel=0.01)  # type: ignore[union-attr]


def test_phases_add_up_to_the_whole_request(made_run: MakeRun) -> None:
    run = made_run(300)
    done = run.requests.is_finished
    phases = phases_of(run.requests, done, run.moves)
    e2el_ms = (run.requests.last_token_ns - run.requests.arrival_ns)[done] / 1e6
    np.testing.assert_allclose(sum(phases.values()), e2el_ms)
    assert phases["pool_load"].max() == 2.0
    without = phases_of(run.requests, done)
    assert not without["pool_load"].any()
    np.testing.assert_allclose(without["prefill_queue"], phases["pool_load"] + phases["prefill_queue"])


def test_the_head_says_what_ran_and_how_well(made_run: MakeRun, show: Callable[..., Page]) -> None:
    run = made_run(100)
    text = show(run, name="my run", goodput=Goodput(ttft_ms=50.0)).text
    summary = summarize_columns(run, goodput=Goodput(ttft_ms=50.0))
    for words in (
        "my run: 100 requests on",
        "hardware cloudmatrix384",
        "workload made & drawn",
        "completed 100 of 100",
        f"goodput (TTFT 50 ms) {summary.request_goodput:,.4g} /s",
        f"TTFT {summary.simulated['ttft'].mean_ms:,.2f}",
        f"prompt tokens cached {100 * summary.cache_hit_rate:.1f} %",  # type: ignore[operator]
    ):
        assert words in text


def test_runs_that_lack_something_say_so(made_run: MakeRun, show: Callable[..., Page]) -> None:
    text = show(made_run(30, has_pool=False, has_moves=False)).text
    assert "This run has no pool." in text
    assert "the load from the pool is in the prefill queue" in text
    page = show(made_run(30, is_colocated=True), shape="colocated")
    assert "No block was moved." in page.text
    assert page.figures["rows"]["data"][0]["name"] == "colocated-0"
    interrupted = show(dataclasses.replace(made_run(30, num_unfinished=5), num_not_arrived=7)).text
    assert "7 requests of the workload had not arrived" in interrupted
    assert "Not finished: 5 aborted: shutdown." in interrupted
    assert "completed 25 of 30" in interrupted


def test_a_run_without_a_finished_request_is_readable(made_run: MakeRun, show: Callable[..., Page]) -> None:
    text = show(made_run(4, num_unfinished=4)).text
    assert "No request finished." in text
    assert "completed 0 of 4" in text
    page = show(_empty(made_run(2)))
    assert "0 requests on" in page.text
    assert not re.search(r"\bnan\b", page.text)


def test_numbers_and_units_are_for_people() -> None:
    assert numbers([1.23456789, np.nan, np.inf, 3]) == [1.23457, None, None, 3.0]
    assert [scaled_bytes(n) for n in (12, 70_272, 8_589_934_592)] == ["12 B", "70.3 kB", "8.59 GB"]
    ticks = log_axis("t", [20.0, 300.0])
    assert {20, 50, 100, 200} <= set(ticks["tickvals"])
    assert "type" not in log_axis("t", [20.0, 30.0])  # linear
    assert "type" not in log_axis("t", [20.0, 30.0])  # linear


def _empty(run: RunColumns) -> RunColumns:
    """Nothing arrived, nothing stepped."""
    columns = {f.name: getattr(run.requests, f.name) for f in dataclasses.fields(RequestColumns)}
    none = {name: value[:0] for name, value in columns.items() if name != "reasons"}
    instances = []
    for instance in run.instances:
        fields = {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}
        cut = {name: value[:0] for name, value in fields.items() if isinstance(value, np.ndarray)}
        instances.append(dataclasses.replace(instance, **cut, breakdown_ns={}))
    requests = dataclasses.replace(run.requests, **none)
    return dataclasses.replace(
        run, requests=requests, instances=tuple(instances), pool=None, moves=None, planes={}, simulated_s=0.0
    )
