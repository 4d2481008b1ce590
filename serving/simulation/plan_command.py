"""`supernode plan`.

Owns: its options, its table and its JSON, its exit codes: 0 when something holds the SLO, 1 when nothing does, 130 when
it was interrupted, after what was found so far.
Must not know: how candidates are found and judged.
"""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serving.cli_options import Json, Overrides
from serving.errors import ConfigError

if TYPE_CHECKING:
    from serving.simulation.plan_trials import Plan, Split, Trial
    from serving.simulation.planner import Planner
    from serving.simulation.slo import Slo

NICKNAMES = {"h800": "h800-ep144"}  # of presets
MAX_LOSERS = 8  # in the table; the JSON has all


def plan(
    ttft_ms: Annotated[float, typer.Option("--slo-ttft-ms", help="Time to first token, at the percentile.")],
    tpot_ms: Annotated[float, typer.Option("--slo-tpot-ms", help="Time per output token, at the percentile.")],
    hardware: Annotated[
        str, typer.Option(help="Preset or YAML file whose prefill and decode instances are counted; or h800.")
    ] = "cloudmatrix384",
    percentile: Annotated[float, typer.Option(help="Of the requests, that keep to both.")] = 99.0,
    workload: Annotated[str | None, typer.Option(help="Built-in workload; else the preset's.", metavar="NAME")] = None,
    trace: Annotated[Path | None, typer.Option(help="Workload from a trace.", dir_okay=False, exists=True)] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second that must be held, by few NPUs.")] = None,
    npus: Annotated[int | None, typer.Option(help="NPUs that must hold a high rate.", min=1)] = None,
    duration: Annotated[
        float | None, typer.Option(help="Seconds of arrivals in a simulation; else as long as requests need.", min=0)
    ] = None,
    overrides: Overrides = None,
    max_simulations: Annotated[int, typer.Option(help="Stop the search after so many.", min=1)] = 100,
    json_file: Json = None,
) -> None:
    """Find the cheapest split that holds an SLO at --rate, or the highest rate that --npus hold; say why others lost.

    Every candidate is simulated. Measured are the requests of the middle half of the arrivals; a run whose queue
    grows, or that loses requests, holds nothing. Ctrl-C prints what was found so far.
    """
    from tqdm import tqdm

    from serving.simulation.planner import Planner
    from serving.simulation.run_source import WorkloadSource
    from serving.simulation.slo import Slo

    if (rate is None) == (npus is None):
        raise ConfigError("plan: give one of --rate and --npus: the other is what is looked for")
    if rate is not None and not 0 < rate < 1e9:
        raise ConfigError(f"--rate: {rate:g} must be a number of requests per second above 0")
    started = time.monotonic()
    slo = Slo(ttft_ms=ttft_ms, tpot_ms=tpot_ms, percentile=percentile)
    source = WorkloadSource.of(trace=trace, name=workload, duration_s=duration or None)
    # On standard error, and only where a person looks at it.
    with tqdm(unit="simulation", disable=None, file=sys.stderr) as bar:

        def show(split: "Split", at_rate: float) -> None:
            bar.set_description(f"{split} at {at_rate:,.4g} req/s")
            bar.update()

        planner = Planner(
            NICKNAMES.get(hardware, hardware),
            overrides=overrides or (),
            source=source,
            slo=slo,
            max_simulations=max_simulations,
            on_trial=show,
        )
        found = planner.cheapest(rate) if rate is not None else planner.highest_rate(npus or 0)
    wall_s = time.monotonic() - started
    asked = f"at {rate:,.4g} req/s" if rate is not None else f"with {npus} NPUs"
    typer.echo(f"{hardware}, {source}, {asked}: P{percentile:g} TTFT <= {ttft_ms:,g} ms, TPOT <= {tpot_ms:,g} ms")
    typer.echo(format_plan(found, planner, by_rate=rate is not None))
    typer.echo(f"{len(planner.trials)} simulations in {wall_s:.1f} s" + ("" if found.is_complete else "; not complete"))
    if json_file is not None:
        values = _as_json(found, planner, slo) | {"rate": rate, "npus": npus, "wall_s": wall_s}
        json_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if found.is_interrupted:
        raise typer.Exit(130)
    if found.chosen is None:
        raise typer.Exit(1)


def format_plan(found: "Plan", planner: "Planner", *, by_rate: bool) -> str:
    """The chosen deployment and why the next best lost, without a newline at the end."""
    lines = []
    shown = found.chosen or found.closest
    if found.chosen is None:
        lines.append("Nothing holds it." + (" Closest:" if shown else ""))
    if shown is not None:
        lines += _table(shown)
    if found.chosen is None and shown is not None:
        lines.append(f"It misses: {'; '.join(shown.reasons())}")
    losers = _losers(found, planner, by_rate=by_rate)
    if losers or found.notes:
        lines.append("Why the others lost:" if found.chosen else "The others:")
        lines += [f"  {line}" for line in (*losers[:MAX_LOSERS], *found.notes)]
        if len(losers) > MAX_LOSERS:
            lines.append(f"  and {len(losers) - MAX_LOSERS} more")
    if by_rate and found.chosen is not None and found.chosen.split == planner.split(1, 1):
        lines.append("No smaller deployment exists.")
    if not found.is_complete:
        how = "was interrupted" if found.is_interrupted else "stopped"
        lines.append(f"The search {how} after {len(planner.trials)} simulations; better ones may exist.")
    return "\n".join(lines)


def _table(trial: "Trial") -> list[str]:
    split, caps, attained = trial.split, trial.caps, trial.attained
    rows = [
        ("Instances", f"{split.prefill} prefill, {split.decode} decode"),
        ("NPUs", f"{split.num_npus}"),
        ("Rate (req/s)", f"{trial.rate:,.4g}"),
        ("instances.decode.max_num_seqs", f"{caps.decode}"),
        ("instances.prefill.max_num_batched_tokens", f"{caps.prefill}"),
    ]
    if attained is not None:
        percentile = f"P{attained.slo.percentile:g}"
        rows += [
            (f"{percentile} TTFT (ms)", f"{attained.ttft_ms:,.1f}"),
            (f"{percentile} TPOT (ms)", f"{attained.tpot_ms:,.2f}"),
            ("Prefill busy (%)", f"{100 * attained.prefill_busy:.1f}"),
            ("Decode busy (%)", f"{100 * attained.decode_busy:.1f}"),
            ("Requests in a decode step", f"{attained.mean_decode_seqs:,.1f}"),
            ("Output tok/s per NPU", f"{attained.output_tokens_per_s / split.num_npus:,.1f}"),
            ("Requests measured", f"{attained.num_measured:,}"),
        ]
    return [f"  {name:<42}{value}" for name, value in rows]


def _losers(found: "Plan", planner: "Planner", *, by_rate: bool) -> list[str]:
    """A line for each: other caps of the chosen split, then other splits, the closest first."""
    lines, chosen = [], found.chosen
    if chosen is not None:
        for trial in planner.trials.values():
            if (trial.split, trial.rate) == (chosen.split, chosen.rate) and trial != chosen:
                lines.append(
                    f"decode cap {trial.caps.decode}, prefill cap {trial.caps.prefill}: {'; '.join(trial.reasons())}"
                )
        miss = found.first_misses.get(chosen.split)
        if miss is not None:
            lines.append(f"{miss.rate:,.4g} req/s: {'; '.join(miss.reasons())}")
    shown = chosen or found.closest
    others = [trial for split, trial in found.outcomes.items() if shown is None or split != shown.split]
    for trial in sorted(others, key=lambda one: _nearness(one, chosen, by_rate=by_rate)):
        head = f"{trial.split} ({trial.split.num_npus} NPUs)"
        if not trial.holds:
            at_rate = "" if by_rate else f" at {trial.rate:,.4g} req/s"
            lines.append(f"{head}{at_rate}: {'; '.join(trial.reasons())}")
        elif by_rate:
            lines.append(f"{head}: holds, with more NPUs")
        else:
            miss = found.first_misses.get(trial.split)  # None: the search stopped before
            beyond = "" if miss is None else f"; at {miss.rate:,.4g}: {'; '.join(miss.reasons())}"
            lines.append(f"{head}: up to {trial.rate:,.4g} req/s{beyond}")
    return lines


def _nearness(trial: "Trial", chosen: "Trial | None", *, by_rate: bool) -> tuple[object, ...]:
    """By rate: what was cheaper and missed, the closest first, then what is dearer. Else by the rate that was held."""
    if not by_rate:
        return (-trial.rate if trial.holds else 0.0, trial.excess, trial.split)
    is_cheaper = chosen is None or trial.split < chosen.split
    return (not is_cheaper, not trial.holds, trial.excess, trial.split)


def _as_json(found: "Plan", planner: "Planner", slo: "Slo") -> dict[str, Any]:
    """Everything but what was asked; the same for the same question."""
    return {
        "slo": {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms, "percentile": slo.percentile},
        "mean_input_tokens": planner.mean_input,
        "mean_output_tokens": planner.mean_output,
        "chosen": None if found.chosen is None else _trial_json(found.chosen),
        "closest": None if found.chosen or found.closest is None else _trial_json(found.closest),
        "is_complete": found.is_complete,
        "interrupted": found.is_interrupted,
        "notes": found.notes,
        "num_simulations": len(planner.trials),
        "trials": [_trial_json(trial) for trial in planner.trials.values()],
    }


def _trial_json(trial: "Trial") -> dict[str, Any]:
    attained = trial.attained
    values: dict[str, Any] = {
        "prefill_instances": trial.split.prefill,
        "decode_instances": trial.split.decode,
        "num_npus": trial.split.num_npus,
        "decode_max_num_seqs": trial.caps.decode,
        "prefill_max_num_batched_tokens": trial.caps.prefill,
        "rate": trial.rate,
        "holds": trial.holds,
        "reasons": [] if trial.holds else trial.reasons(),
    }
    if attained is not None:
        names = (
            "ttft_ms", "tpot_ms", "place_wait_ms", "num_measured", "num_lost", "queue_growth", "prefill_busy",
            "decode_busy", "mean_decode_seqs", "output_tokens_per_s",
        )  # fmt: skip
        # JSON has no infinity: nothing finished.
        values |= {name: v if (v := getattr(attained, name)) != float("inf") else None for name in names}
    return values
