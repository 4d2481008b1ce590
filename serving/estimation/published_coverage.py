"""The ranges that a device's published figures cover, and an estimate's arguments held against them.

Owns: which arguments matter to which estimate, and what is said about each.
Must not know: what an estimate computes, command lines.
Source: the arguments of the rows in configs/published/*.yaml, each of which has its own source.

Arguments are looked at one by one: a number lies between the smallest and the largest published one, a word was
published. So a combination may be new although none of its arguments is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, TypeGuard

from serving.estimation.coverage import Coverage
from serving.estimation.estimate_inputs import defaults_of, model_of
from serving.estimation.estimates import ESTIMATES
from serving.estimation.published import PublishedRow, Scalar, load_published

PUBLISHED_MODEL = "deepseek-r1"  # whose figures all rows are

# Not compared. The answer is exact in an acceptance; arXiv 2506.12708v2, tables 8 and 9, name no sizes of attention.
_FREE: Mapping[str, frozenset[str]] = {
    "decode": frozenset({"acceptance"}),
    "attention": frozenset({"requests_per_die", "kv_len"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Values of one argument over the rows: smallest and largest number, and everything that is none."""

    low: float | None
    high: float | None
    others: frozenset[Scalar]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRange:
    """What the rows about a device ask of one estimate; `is_fitted`: not all of them are for comparison only."""

    seen: Mapping[str, Seen]
    is_fitted: bool


def compare_arguments(coverage: Coverage, name: str, arguments: Mapping[str, Any], *, hardware: str) -> None:
    """Hold all arguments of an estimate against the rows about the device `hardware`."""
    note_settings(coverage, name, arguments)
    published = published_ranges(hardware).get(name)
    if published is None:
        coverage.leave("hardware", "unpublished", f"hardware {hardware}: no published figures of {name}")
        return
    for argument, value in _that_matter(name, arguments).items():
        seen = published.seen.get(argument)  # None: it matters in no row about the device
        if seen is None:
            coverage.leave(argument, "unpublished", f"{argument} {value}: no published figure")
        elif _is_number(value) and seen.low is not None and seen.high is not None:
            coverage.compare(argument, value, seen.low, seen.high)
        elif value not in seen.others:
            coverage.leave(argument, "unpublished", f"{argument} {value}: no published figure")
    if not published.is_fitted:
        coverage.notes.append(f"published figures of {hardware} leave settings open, and none was fitted")
    if name == "attention":
        coverage.notes.append("the published utilizations do not say for how many requests, nor how long they are")


def note_settings(coverage: Coverage, name: str, arguments: Mapping[str, Any]) -> None:
    """Say it where a prompt's reuse has no effect, and for which load a decode step without balancing is charged."""
    if name == "decode" and arguments["balance"] == "none" and arguments["skew"] is None:
        coverage.notes.append(
            "balance none: for a load as even as the published evaluation's; production loads are reported to be far "
            "more skewed, and skew 1 is that of one translation set"
        )
    if arguments.get("pool_plane") == "none" and arguments.get("reuse"):
        coverage.notes.append(f"pool_plane none: nothing is reused, reuse {arguments['reuse']:g} has no effect")


def without_effect(name: str, arguments: Mapping[str, Any]) -> set[str]:
    """Arguments that cannot change the answer, given the others."""
    without: set[str] = set()
    if arguments.get("balance") == "balanced":
        without |= {"skew"}
    if name == "decode":
        without |= {"attention_aic"} if arguments["microbatch"] == "off" else set()
        without |= {"mtp_pipelined"} if not arguments["mtp"] else set()
    if name == "prefill":
        without |= {"reuse"} if arguments["pool_plane"] == "none" else set()
        without |= {"pool_plane"} if not arguments["reuse"] or arguments["pool_plane"] == "none" else set()
    return without


def compare_model(coverage: Coverage, arguments: Mapping[str, Any]) -> None:
    """Leave for another model than the published; note more tokens than it has positions."""
    if "model" not in arguments:
        return
    model, shape = arguments["model"], model_of(arguments["model"])
    if shape != model_of(PUBLISHED_MODEL):
        coverage.leave("model", "unpublished", f"model {model}: published figures are of {PUBLISHED_MODEL}")
    longest = max(arguments.get("kv_len", 0), arguments.get("prompt_len", 0))
    if longest > shape.max_position_embeddings:
        coverage.notes.append(f"model {model} has {shape.max_position_embeddings} positions, fewer than {longest}")


@lru_cache(maxsize=8)
def published_ranges(hardware: str) -> Mapping[str, PublishedRange]:
    """By estimate, from all shipped rows about a device."""
    values: dict[str, dict[str, set[Scalar]]] = {}
    fitted: set[str] = set()
    for row in _rows_about(hardware):
        name = row.ours.estimate
        if row.role != "comparison":
            fitted.add(name)
        for changed in ({}, row.ours.minus, row.ours.over):
            if changed is not None:
                arguments = {**defaults_of(ESTIMATES[name]), **row.ours.arguments, **changed}
                for argument, value in _that_matter(name, arguments).items():
                    values.setdefault(name, {}).setdefault(argument, set()).add(value)
    return {
        name: PublishedRange(
            seen={argument: _seen(found) for argument, found in arguments.items()}, is_fitted=name in fitted
        )
        for name, arguments in values.items()
    }


def _that_matter(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Without machine and model, which are compared as a whole, and without what cannot change the answer."""
    without = {"hardware", "model", *_FREE.get(name, ()), *without_effect(name, arguments)}
    return {argument: value for argument, value in arguments.items() if argument not in without}


def _rows_about(hardware: str) -> Iterator[PublishedRow]:
    for file in sorted(resources.files("configs").joinpath("published").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            told = load_published(f"published/{file.name}")
            yield from (row for row in told.rows if (row.hardware or told.hardware) == hardware)


def _seen(values: set[Scalar]) -> Seen:
    numbers = [value for value in values if _is_number(value)]
    others = frozenset(value for value in values if not _is_number(value))
    return Seen(low=min(numbers, default=None), high=max(numbers, default=None), others=others)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
