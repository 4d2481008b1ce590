"""`supernode estimate`: what-if questions to the time model, or to measured tables.

Owns: its options, and what it prints.
Must not know: how an answer is computed, where it can be trusted.

Options and defaults are the arguments of the functions in serving.estimation.estimates.ESTIMATES; they check values.
"""

import json
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(no_args_is_help=True, help="What a step, an operator or a transfer takes, and how sure that is.")

Switch = Literal["on", "off"]
Hardware = Annotated[str, typer.Option(help="Machine, or its YAML file.")]
Model = Annotated[str, typer.Option(help="Model, or its YAML file.")]
Microbatch = Annotated[Switch, typer.Option(help="Two microbatches that overlap, or one batch.")]
Balance = Annotated[
    Literal["balanced", "eplb", "none"],
    typer.Option(help="Load of the experts: even, placed by EPLB with redundant experts, or as it comes."),
]
Skew = Annotated[
    float | None,
    typer.Option(
        help="Skew of the experts' load: 1 is that of the generator's data set; if not given, 1 in prefill and the "
        "fitted share of it in decode, whose batches mix thousands of requests."
    ),
]
Tables = Annotated[
    str | None,
    typer.Option(
        help="Answer from measured operators, for hardware h100 or h200 (an NPU is one GPU): a folder of tables, or "
        "'package' for the installed aiconfigurator-core.",
        metavar="DIR",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON, and nothing else.")]


@app.command()
def decode(
    hardware: Hardware = "cloudmatrix384",
    model: Model = "deepseek-r1",
    batch_per_npu: Annotated[int, typer.Option(help="Requests on every NPU.")] = 96,
    kv_len: Annotated[int, typer.Option(help="Tokens in a request's cache.")] = 4096,
    ep: Annotated[int, typer.Option(help="Dies of the instance; its experts are spread over all.")] = 320,
    mtp: Annotated[int, typer.Option(help="Drafts of a step.")] = 1,
    acceptance: Annotated[float, typer.Option(help="Share of drafts that are accepted.")] = 0.7,
    microbatch: Microbatch = "on",
    balance: Balance = "eplb",
    skew: Skew = None,
    attention_aic: Annotated[
        int | None, typer.Option(help="Cube cores of the attention stream; tuned if not given.", metavar="CORES")
    ] = None,
    mtp_pipelined: Annotated[
        Switch, typer.Option(help="The graphs of a step follow each other, or each waits for its launch.")
    ] = "on",
    tables: Tables = None,
    as_json: AsJson = False,
) -> None:
    """TPOT and throughput of a decode instance in a steady state."""
    arguments = {
        "hardware": hardware,
        "model": model,
        "batch_per_npu": batch_per_npu,
        "kv_len": kv_len,
        "ep": ep,
        "mtp": mtp,
        "acceptance": acceptance,
        "microbatch": microbatch,
        "balance": balance,
        "skew": skew,
        "attention_aic": attention_aic,
        "mtp_pipelined": mtp_pipelined,
    }
    _answer("decode", arguments, tables=tables, as_json=as_json)


@app.command()
def prefill(
    hardware: Hardware = "cloudmatrix384",
    model: Model = "deepseek-r1",
    prompt_len: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 4096,
    tokens_per_npu: Annotated[int, typer.Option(help="Tokens of a batch on every NPU, reused ones included.")] = 16384,
    ep: Annotated[int, typer.Option(help="Dies of the instance; its experts are spread over all.")] = 32,
    mtp: Annotated[int, typer.Option(help="1: the MTP module fills its cache too, for drafts in decode.")] = 0,
    microbatch: Microbatch = "on",
    balance: Balance = "eplb",
    skew: Skew = None,
    reuse: Annotated[float, typer.Option(help="Share of a prompt that is read from the pool.")] = 0.0,
    pool_plane: Annotated[
        Literal["ub", "vpc", "none"], typer.Option(help="Plane to the pool; none: nothing is reused.")
    ] = "ub",
    tables: Tables = None,
    as_json: AsJson = False,
) -> None:
    """TTFT and throughput of a prefill instance, without queueing."""
    arguments = {
        "hardware": hardware,
        "model": model,
        "prompt_len": prompt_len,
        "tokens_per_npu": tokens_per_npu,
        "ep": ep,
        "mtp": mtp,
        "microbatch": microbatch,
        "balance": balance,
        "skew": skew,
        "reuse": reuse,
        "pool_plane": pool_plane,
    }
    _answer("prefill", arguments, tables=tables, as_json=as_json)


Near = Annotated[
    Literal["package", "node"] | None,
    typer.Option(
        help="Dies that copies reach over a nearer link than the plane; the hardware's own kernels if not given."
    ),
]
ExchangeEp = Annotated[int, typer.Option(help="Ranks that exchange, one die each.")]
ExchangeTokens = Annotated[int, typer.Option(help="Tokens of every rank.")]


@app.command()
def dispatch(
    hardware: Hardware = "cloudmatrix384",
    model: Model = "deepseek-r1",
    ep: ExchangeEp = 64,
    tokens: ExchangeTokens = 128,
    near: Near = None,
    tables: Tables = None,
    as_json: AsJson = False,
) -> None:
    """Latency and bandwidth of sending tokens to their experts."""
    arguments = {"hardware": hardware, "model": model, "ep": ep, "tokens": tokens, "near": near}
    _answer("dispatch", arguments, tables=tables, as_json=as_json)


@app.command()
def combine(
    hardware: Hardware = "cloudmatrix384",
    model: Model = "deepseek-r1",
    ep: ExchangeEp = 64,
    tokens: ExchangeTokens = 128,
    near: Near = None,
    tables: Tables = None,
    as_json: AsJson = False,
) -> None:
    """Latency and bandwidth of bringing the experts' results back."""
    arguments = {"hardware": hardware, "model": model, "ep": ep, "tokens": tokens, "near": near}
    _answer("combine", arguments, tables=tables, as_json=as_json)


@app.command()
def gemm(
    m: Annotated[int, typer.Option(help="Rows of the first matrix.")],
    n: Annotated[int, typer.Option(help="Columns of the second matrix.")],
    k: Annotated[int, typer.Option(help="Columns of the first, rows of the second.")],
    groups: Annotated[int, typer.Option(help="Products of this size in one operator.")] = 1,
    hardware: Hardware = "cloudmatrix384",
    tables: Tables = None,
    as_json: AsJson = False,
) -> None:
    """Grouped product with 8-bit inputs and BF16 output on one die."""
    arguments = {"hardware": hardware, "groups": groups, "m": m, "n": n, "k": k}
    _answer("gemm", arguments, tables=tables, as_json=as_json)


@app.command()
def attention(
    hardware: Hardware = "cloudmatrix384",
    model: Model = "deepseek-r1",
    requests_per_die: Annotated[int, typer.Option(help="Requests.")] = 48,
    kv_len: Annotated[int, typer.Option(help="Tokens in a request's cache.")] = 4096,
    query_tokens: Annotated[int, typer.Option(help="New tokens of a request; with a draft there are 2.")] = 1,
    num_heads: Annotated[int, typer.Option(help="Query heads.")] = 128,
    as_json: AsJson = False,
) -> None:
    """Decode attention of one layer on one die: bound by compute or by memory."""
    arguments = {
        "hardware": hardware,
        "model": model,
        "requests_per_die": requests_per_die,
        "kv_len": kv_len,
        "query_tokens": query_tokens,
        "num_heads": num_heads,
    }
    _answer("attention", arguments, as_json=as_json)


@app.command()
def transfer(
    num_bytes: Annotated[int, typer.Option("--bytes", help="Size.")],
    hardware: Hardware = "cloudmatrix384",
    plane: Annotated[Literal["ub", "rdma", "vpc"], typer.Option(help="Network.")] = "ub",
    source: Annotated[Literal["npu", "cpu"], typer.Option("--from", help="One end.")] = "npu",
    target: Annotated[Literal["npu", "cpu"], typer.Option("--to", help="The other end.")] = "cpu",
    op: Annotated[Literal["read", "write"], typer.Option(help="Who moves the bytes: the receiver, or the sender.")] = (
        "read"
    ),
    scope: Annotated[
        Literal["inter", "intra", "package"], typer.Option(help="Between nodes, within one, or between an NPU's dies.")
    ] = "inter",
    flows: Annotated[
        int, typer.Option(help="Such transfers at once, from as many sources into one target, which they share.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """One transfer alone between two dies or hosts, or several into one: time of the last, bandwidth of each."""
    arguments = {
        "hardware": hardware,
        "plane": plane,
        "source": source,
        "target": target,
        "op": op,
        "num_bytes": num_bytes,
        "scope": scope,
        "flows": flows,
    }
    _answer("transfer", arguments, as_json=as_json)


@app.command()
def load_model(
    hardware: Hardware = "cloudmatrix384",
    model_bytes: Annotated[float, typer.Option(help="Size of a model.")] = 671e9,
    instances: Annotated[int, typer.Option(help="Instances that load it at once.")] = 8,
    models: Annotated[int, typer.Option(help="Models among which an instance switches.")] = 8,
    cache: Annotated[
        Literal["none", "local", "ems"], typer.Option(help="None, DRAM of each instance, or one pool for all.")
    ] = "ems",
    cached_models: Annotated[
        int | None,
        typer.Option(help="Models that a cache holds; 1 in a local one, all in the pool, if not given.", metavar="N"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Cold start, warm start and switching of models, by where they are cached."""
    arguments = {
        "hardware": hardware,
        "model_bytes": model_bytes,
        "instances": instances,
        "models": models,
        "cache": cache,
        "cached_models": cached_models,
    }
    _answer("load_model", arguments, as_json=as_json)


@app.command()
def switches(
    npus: Annotated[int, typer.Option(help="NPUs of the supernode.")],
    hardware: Hardware = "cloudmatrix384",
    as_json: AsJson = False,
) -> None:
    """Second-level switches that a supernode needs, and how well they are used."""
    _answer("switches", {"hardware": hardware, "npus": npus}, as_json=as_json)


def _answer(name: str, arguments: dict[str, Any], *, as_json: bool, tables: str | None = None) -> None:
    from serving.estimation.estimate_report import format_answer
    from serving.estimation.what_if import estimate

    answer = estimate(name, tables=tables, **arguments)
    if tables is not None:
        arguments["tables"] = tables
    if as_json:
        told = {"estimate": name, "arguments": arguments, **answer}
        typer.echo(json.dumps(told, indent=2, allow_nan=False))
    else:
        typer.echo(format_answer(name, arguments, answer))
