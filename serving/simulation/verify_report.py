"""A verification as people and scripts read it: one table with the reasons below it, and one JSON object.

Owns: both layouts.
Must not know: files, the terminal, how the figures came about.
"""

import dataclasses
from typing import Any

from serving.simulation.verify import Reasons, Row, Verification

WIDTH = 100
_HEAD = f"{'':<28}{'predicted':>12}{'observed':>12}{'difference':>12}{'%':>9}{'by arrivals':>14}{'rest':>13}"


def format_verification(result: Verification) -> str:
    """The table, without a newline at the end."""
    lines = [" Predicted against Observed (simulated clock) ".center(WIDTH, "="), _HEAD, "-" * WIDTH]
    lines += [_row(row) for row in result.rows]
    lines += [
        "-" * WIDTH,
        "by arrivals: what the simulation says of the instants at which requests came, less the prediction.",
        "rest: what is observed beyond that.",
        " What Makes the Difference ".center(WIDTH, "-"),
        *_reason_lines(result.reasons),
        " Verdict ".center(WIDTH, "-"),
        *(f"FAILED: {failure}" for failure in result.failures),
        f"{result.num_within} of {len(result.rows)} figures are within {result.limit_percent:g} % of the prediction"
        + (" (no tolerance was asked for)." if result.tolerance is None else f": {_verdict(result)}."),
        "supernode replay gives the predicted figures exactly: the same tensors and actors, in virtual time.",
    ]
    return "\n".join([*lines, "=" * WIDTH])


def to_json(result: Verification) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "figures": [
            {
                "name": row.name,
                "predicted": row.predicted,
                "observed": row.observed,
                "difference": row.difference,
                "percent": row.percent,
                "by_arrivals": row.by_arrivals,
                "rest": row.rest,
            }
            for row in result.rows
        ],
        "reasons": dataclasses.asdict(result.reasons),
        "failures": list(result.failures),
        "tolerance_percent": result.tolerance,
        "limit_percent": result.limit_percent,
        "num_within": result.num_within,
        "num_figures": len(result.rows),
        "exit_code": result.exit_code,
    }


def _verdict(result: Verification) -> str:
    return "all within the tolerance" if result.num_within == len(result.rows) else "NOT within the tolerance"


def _row(row: Row) -> str:
    percent = "-" if row.percent is None else _signed(row.percent, 2)
    return (
        f"{row.name:<28}{row.predicted:>12.3f}{row.observed:>12.3f}{_signed(row.difference):>12}{percent:>9}"
        f"{_signed(row.by_arrivals):>14}{_signed(row.rest):>13}"
    )


def _signed(value: float, num_decimals: int = 3) -> str:
    """0 where rounding leaves nothing: the server reports milliseconds with six decimals."""
    rounded = round(value, num_decimals)
    return f"{rounded:+.{num_decimals}f}" if rounded else "0"


def _reason_lines(reasons: Reasons) -> list[str]:
    """One reason after the other, with its size."""
    r = reasons
    others = r.lag_s - r.hold_lag_s
    faster = f"{100 * (r.workload_span_s / r.arrival_span_s - 1):+.2f} % rate" if r.arrival_span_s else "one instant"
    entries = [
        (
            "lag",
            f"{r.lag_s:.3f} s of {r.wall_s:.2f} s wall ({r.lag_percent:.2f} %) in which simulated time stood still: "
            f"{r.hold_lag_s:.3f} s",
        ),
        ("", f"for real compute that was late, {others:.3f} s for a processor that was busy. It is in no figure above"),
        ("", f"but through arrivals. Per request: {_ms(r.lag_ttft_s)} of TTFT, {_ms(r.lag_e2el_s)} of E2EL, wall."),
        (
            "arrivals",
            f"{r.arrival_span_s:.3f} s simulated from first to last, {r.workload_span_s:.3f} s in the workload "
            f"({faster});",
        ),
        (
            "",
            f"against it, a request came {_ms(r.mean_shift_s, sign=True)} on average, "
            f"{_ms(r.most_early_s, sign=True)} to {_ms(r.most_late_s, sign=True)}.",
        ),
        (
            "",
            f"{r.num_same_instant} of {r.num_requests} came at the very instant of another or of a step's end: "
            "which is first is chance.",
        ),
        (
            "HTTP and client",
            f"{_ms(r.http_ttft_s)} of TTFT and {_ms(r.http_e2el_s)} of E2EL, wall, mean per request. In no figure "
            "above.",
        ),
        ("output lengths", f"{r.num_other_lengths} of {r.num_requests} other than predicted (sent with ignore_eos)."),
    ]
    if r.predicted_acceptance is not None or r.observed_acceptance is not None:
        entries.append(
            ("drafts", f"{_share(r.predicted_acceptance)} accepted as assumed, {_share(r.observed_acceptance)} live.")
        )
    entries += [
        ("decisions", f"{r.num_same_events} of {r.num_events} events of the live log are in that of the simulation"),
        ("", "with the same arrivals, at the same nanosecond."),
    ]
    return [f"{name + ':' if name else '':<17}{text}" for name, text in entries]


def _ms(seconds: float, *, sign: bool = False) -> str:
    return f"{seconds * 1e3:+.2f} ms" if sign else f"{seconds * 1e3:.2f} ms"


def _share(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"
