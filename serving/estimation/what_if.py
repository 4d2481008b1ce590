"""One function for every what-if question: the answer of the time model or of measured tables, and its coverage.

Owns: the names of questions and arguments as a user gives them, and which of the two answers.
Must not know: command lines, how an answer is computed.

`supernode estimate` asks this; so may anyone:

    estimate("decode", batch_per_npu=64, kv_len=8192)["tpot_ms"]
    estimate("decode", hardware="h100", tables="package", batch_per_npu=128, ep=64)["coverage"]["inside"]
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args

from devices.grid import OutOfGrid
from devices.measured_tables import Gpu, MeasuredTables
from devices.table_files import GPUS_PER_NODE
from serving.errors import ConfigError, shown
from serving.estimation.coverage import Coverage, compare_machine
from serving.estimation.estimate_inputs import check_choice, check_shares, defaults_of, hardware_of
from serving.estimation.estimates import ESTIMATES, PoolPlane
from serving.estimation.measured_estimates import MEASURED
from serving.estimation.operator_estimates import Answer
from serving.estimation.published_coverage import (
    compare_arguments,
    compare_model,
    note_settings,
    without_effect,
)

PACKAGE = "package"  # in place of a folder of tables: the installed aiconfigurator-core


def estimate(name: str, *, tables: str | None = None, **arguments: Any) -> Answer:
    """The answer of `name` in serving.estimation.estimates.ESTIMATES, with `coverage` (serving/estimation/coverage.py).

    `tables`: a folder of measured tables, or "package", for hardware h100 or h200; they answer in place of the model,
    with the same keys, and never beyond what was measured.
    Raises ConfigError naming the argument, its value and the limit.
    """
    if name not in ESTIMATES:
        raise ConfigError(f"estimate: {shown(name)}, there are {', '.join(ESTIMATES)}")
    given = complete_arguments(name, arguments)
    if tables is not None:
        return _measured(name, given, tables)
    try:
        answer = ESTIMATES[name](**given)
    except ConfigError:
        raise
    except ValueError as error:  # of a machine that cannot do it, from devices/
        raise ConfigError(str(error)) from None
    if "coverage" not in answer:
        coverage, machine = Coverage(), hardware_of(given["hardware"])
        compare_machine(coverage, machine)
        compare_model(coverage, given)
        compare_arguments(coverage, name, given, hardware=machine.name)
        answer["coverage"] = coverage.as_json()
    return answer


def complete_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of an estimate, with the defaults of those that were not given. Raises ConfigError."""
    known = inspect.signature(ESTIMATES[name]).parameters
    unknown = [argument for argument in arguments if argument not in known]
    if unknown:
        raise ConfigError(f"{name}: no argument {unknown[0]}, it takes {', '.join(known)}")
    complete = defaults_of(ESTIMATES[name]) | dict(arguments)
    missing = [argument for argument in known if argument not in complete]
    if missing:
        raise ConfigError(f"{name}: {missing[0]} is not given")
    return {argument: complete[argument] for argument in known}


def _measured(name: str, given: Mapping[str, Any], tables: str) -> Answer:
    if name not in MEASURED:
        raise ConfigError(f"tables: {name} cannot be answered from tables, only {', '.join(MEASURED)}")
    gpu = given["hardware"]
    if gpu not in get_args(Gpu):
        raise ConfigError(f"tables: hardware {shown(gpu)} was not measured, only {', '.join(get_args(Gpu))}")
    if name == "prefill":
        check_shares(reuse=given["reuse"])
        check_choice("pool_plane", given["pool_plane"], get_args(PoolPlane))
    takes = inspect.signature(MEASURED[name]).parameters
    not_asked = {"hardware", *takes, *without_effect(name, given)}
    for argument, default in defaults_of(ESTIMATES[name]).items():
        if argument not in not_asked and given[argument] != default:
            raise ConfigError(f"{argument}: {shown(given[argument])} was not measured; with tables it is {default}")
    try:
        read = MeasuredTables.from_package if tables == PACKAGE else _from_directory(tables)
        answer = MEASURED[name](read(gpu=gpu), **{argument: given[argument] for argument in given if argument in takes})
    except ConfigError:
        raise
    except OutOfGrid as error:
        if error.field != "nodes":
            raise ConfigError(f"{name} on {gpu}: {error}") from None
        low, high = GPUS_PER_NODE * error.low, GPUS_PER_NODE * error.high
        raise ConfigError(f"ep: {given['ep']} is outside the measured {low:g} to {high:g} of {gpu}") from None
    except ValueError as error:  # TableError, and degrees that are no whole nodes
        raise ConfigError(f"{name} on {gpu}: {error}") from None
    if name == "prefill":
        coverage = Coverage()
        note_settings(coverage, name, given)
        answer["coverage"]["notes"] += coverage.notes
    return answer


def _from_directory(tables: str) -> Callable[..., MeasuredTables]:
    return lambda *, gpu: MeasuredTables.from_directory(tables, gpu=gpu)
