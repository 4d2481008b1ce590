"""An evaluation as people read it.

Owns: the two tables.
Must not know: files, the terminal, how the figures came about.
"""

from collections.abc import Mapping, Sequence

from serving.evaluation.comparison import SIGNIFICANCE, EarlierResult, GroupComparison
from serving.evaluation.questions import EXTRA_GROUPS
from serving.evaluation.result import OVERALL, EvaluationResult, Score

WIDTH = 87
_HEAD = f"{'':<22}{'problems':>10}{'accuracy %':>12}{'95 % interval':>17}{'well-formed %':>15}{'tokens':>11}"
_COMPARED_HEAD = f"{'':<22}{'problems':>10}{'earlier %':>11}{'now %':>8}{'difference':>12}{'lost':>6}{'won':>6}{'p':>9}"


def format_result(result: EvaluationResult) -> str:
    """The table, without a newline at the end."""
    scores = result.scores()
    lines = [" Accuracy on Held-out Problems ".center(WIDTH, "=")]
    lines += _described({**result.subject, **{key: str(value) for key, value in result.settings.items()}})
    if result.is_interrupted:
        lines.append(f"INTERRUPTED: {result.num_not_asked} problems were not answered; what follows is partial.")
    lines += ["-" * WIDTH, _HEAD]
    lines += [_row(score) for score in scores if score.group not in EXTRA_GROUPS]
    lines += ["-" * WIDTH, _row(result.overall)]
    lines += [_row(score) for score in scores if score.group in EXTRA_GROUPS]
    lines.append("-" * WIDTH)
    lines += [
        f"{OVERALL}: all problems of the kinds. well-formed: thinking closed, ended by itself.",
        "tokens: mean of a reply.",
    ]
    failures = [answer.error for answer in result.answers if answer.error is not None]
    if failures:
        lines.append(f"FAILED: {len(failures)} requests, counted as wrong; the first: {failures[0]}")
    held = {name: count for name, count in result.held_at_rest.items() if count}
    if held:
        lines.append(f"STILL HELD at the end: {held}")
    return "\n".join([*lines, "=" * WIDTH])


def format_comparison(comparisons: Sequence[GroupComparison], earlier: EarlierResult) -> str:
    """Both accuracies side by side."""
    lines = [
        " Against the Earlier Result ".center(WIDTH, "="),
        *_described({"earlier": earlier.file} | earlier.subject),
    ]
    lines += ["-" * WIDTH, _COMPARED_HEAD]
    extra = [entry for entry in comparisons if entry.group in EXTRA_GROUPS]
    overall = [entry for entry in comparisons if entry.group == OVERALL]
    lines += [_compared_row(entry) for entry in comparisons if entry not in (*extra, *overall)]
    lines += ["-" * WIDTH, *(_compared_row(entry) for entry in (*overall, *extra)), "-" * WIDTH]
    lines += [
        "The same problems, twice. lost: right then only; won: right now only.",
        f"p: McNemar's exact test; * below {SIGNIFICANCE:g}, not corrected for the number of rows.",
    ]
    for entry in overall:
        verdict = "significant" if entry.is_significant else "not significant"
        lines.append(f"Overall difference {100 * entry.difference:+.2f} points: {verdict} (p = {entry.p_value:.3g}).")
    return "\n".join([*lines, "=" * WIDTH])


def _described(entries: Mapping[str, str]) -> list[str]:
    return [f"{key + ':':<22}{value}" for key, value in entries.items()]


def _row(score: Score) -> str:
    low, high = score.interval
    interval = f"{100 * low:.1f} .. {100 * high:.1f}"
    return (
        f"{score.group:<22}{score.num_problems:>10}{100 * score.accuracy:>12.2f}{interval:>17}"
        f"{100 * score.well_formed:>15.1f}{score.mean_tokens:>11.1f}"
    )


def _compared_row(entry: GroupComparison) -> str:
    num = max(1, entry.num_problems)
    mark = "*" if entry.is_significant else " "
    return (
        f"{entry.group:<22}{entry.num_problems:>10}{100 * entry.num_earlier / num:>11.2f}"
        f"{100 * entry.num_now / num:>8.2f}{100 * entry.difference:>+12.2f}{entry.num_only_earlier:>6}"
        f"{entry.num_only_now:>6}{entry.p_value:>9.4f} {mark}"
    ).rstrip()
