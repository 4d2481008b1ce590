"""`supernode expert-traffic`.

Owns: its options, and what it prints and writes.
Must not know: how traffic is found or drawn.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from serving.cli_options import Json, make_writable
from serving.errors import ConfigError

PICTURE_FILE = "expert_traffic.png"


def expert_traffic(
    model: Annotated[str, typer.Option(help="Whose messages are sent: a shipped shape, or a YAML file.")] = (
        "deepseek-r1"
    ),
    hardware: Annotated[str, typer.Option(help="Whose links: a shipped machine, or a YAML file.")] = "cloudmatrix384",
    ep: Annotated[int, typer.Option(help="Ranks, one die each; they fill packages and nodes in order.", min=1)] = 32,
    slots: Annotated[
        int | None,
        typer.Option(help="Slots of routed experts with EPLB on; one redundant per rank if not given.", min=1),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens per rank and step.", min=1)] = 128,
    load: Annotated[
        Path | None,
        typer.Option(
            help="Load as recorded by expert-load or run --json; drawn from the fitted generator if not given."
        ),
    ] = None,
    drift: Annotated[
        float | None,
        typer.Option(help="Spread of the load around its statistics; the fitted one, or 0 with --load.", min=0),
    ] = None,
    skew: Annotated[
        float,
        typer.Option(
            help="Factor on how uneven the generator's experts are: 1 is the translation data set that it was fitted "
            "to; estimates take expert_load_skew, in the section fitted of the hardware file, which is of the "
            "published evaluation. Not with --load.",
            min=0,
            max=10,
        ),
    ] = 1.0,
    near: Annotated[
        bool, typer.Option("--near", help="Send to a copy in the sender's own node if there is one.")
    ] = False,
    layer: Annotated[
        int | None,
        typer.Option(help="Layer of the model to show; the mean of all and the hottest if not given.", min=0),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the load and of the tokens' choices.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Directory for the picture.", file_okay=False)] = None,
    json_file: Json = None,
) -> None:
    """What EPLB does to the links: dispatch and combine per die, package and node, with it off and on."""
    from serving.core.errors import UnfitRequest
    from serving.core.expert_load_model import ExpertSlots, LoadModel, draw_weights, shares
    from serving.estimation.estimate_inputs import hardware_of, model_of
    from serving.expert_load import read_recorded_load
    from serving.expert_traffic import compare_traffic, default_slots
    from serving.expert_traffic_report import as_json, heading, table
    from serving.published_load import read_published_load

    shape, machine = model_of(model), hardware_of(hardware)
    if ep > machine.num_dies:
        raise ConfigError(f"--ep: {ep} exceeds the {machine.num_dies} dies of {machine.name}")
    if load is not None and skew != 1.0:
        raise ConfigError(f"--skew: {skew:g} is of the generator, recorded load has its own")
    rng = np.random.default_rng(seed)
    if load is None:
        fitted = read_published_load().model
        try:
            skewed = LoadModel(
                sigma_low=fitted.sigma_low * skew, sigma_high=fitted.sigma_high * skew, drift=fitted.drift
            )
        except UnfitRequest as error:
            raise ConfigError(f"--skew: {skew}: {error}") from None
        weights = draw_weights(skewed, num_layers=shape.num_moe_layers, num_experts=shape.n_routed_experts, rng=rng)
        top_k, first_layer, source = (
            shape.num_experts_per_tok,
            shape.first_k_dense_replace,
            (f"generator, seed {seed}, skew {skew:g}"),
        )
        drift = fitted.drift if drift is None else drift
    else:
        recorded = read_recorded_load(str(load))
        weights, top_k, first_layer, source = shares(recorded.total), recorded.top_k, recorded.first_layer, str(load)
        drift = 0.0 if drift is None else drift
    num_layers, num_experts = weights.shape
    if layer is not None and not first_layer <= layer < first_layer + num_layers:
        raise ConfigError(f"--layer: {layer} is not a mixture layer, {first_layer} to {first_layer + num_layers - 1}")
    try:
        router_slots, shared_copies = default_slots(shape, num_experts=num_experts, num_ranks=ep)
    except ValueError as error:  # of fewer experts than a mixture needs
        raise ConfigError(f"{source}: {error}") from None
    num_slots = router_slots if slots is None else slots
    if out is not None:
        make_writable(out)
    try:
        comparison = compare_traffic(
            weights,
            ExpertSlots(
                num_layers=num_layers,
                num_experts=num_experts,
                top_k=top_k,
                num_ranks=ep,
                num_router_slots=num_slots,
                num_shared_copies=shared_copies,
            ),
            tokens_per_rank=tokens,
            drift=drift,
            model=shape,
            hardware=machine,
            near=near,
            rng=rng,
        )
    except UnfitRequest as error:
        raise ConfigError(f"--ep {ep} --slots {num_slots} --drift {drift:g}: {error}") from None
    told = {
        "model": model,
        "hardware": hardware,
        "load": source,
        "ep": ep,
        "tokens_per_rank": tokens,
        "num_experts": num_experts,
        "top_k": top_k,
        "num_shared_copies": shared_copies,
        "skew": skew if load is None else None,
        "drift": drift,
        "near": near,
        "seed": seed,
        "first_layer": first_layer,
    }
    hottest = comparison.hottest_layer
    chosen = hottest if layer is None else layer - first_layer
    typer.echo(heading(told, comparison))
    if layer is None:
        typer.echo(table(comparison, slice(None), f"mean of {num_layers} layers"))
    name = f"layer {first_layer + chosen}" + (", the hottest" if layer is None else "")
    typer.echo(table(comparison, slice(chosen, chosen + 1), name))
    if json_file is not None:
        json_file.write_text(json.dumps(told | as_json(comparison), indent=2) + "\n", encoding="utf-8")
    if out is not None:
        from serving.expert_traffic_picture import draw_expert_traffic

        drawn_from = source if load is None else load.name
        title = f"Dispatch and combine at EP{ep}, {tokens} tokens per rank{', near copies first' if near else ''}; "
        title += f"load: {drawn_from}, {name}"
        draw_expert_traffic(comparison, out / PICTURE_FILE, layer=chosen, first_layer=first_layer, title=title)
        typer.echo(f"wrote {out / PICTURE_FILE}")
