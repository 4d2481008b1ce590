"""How long instances take to load a model and to switch to another one, by where models are cached.

Owns: cold start, warm start, switching, hit rate and DRAM of the three ways to keep models.
Must not know: instances' shapes, clocks, the pool that serves KV.
Source: arXiv 2506.12708v2, section 4.4 and table 2, which calls its latencies illustrative. Symbols: n instances, m
models in use, k models that a cache holds, S bytes of a model, B bucket bandwidth, L loading bandwidth of one instance.

    fetch = S / B       one copy from the bucket, which all instances share
    load = S / L        one instance from DRAM over UB; instances do not disturb each other

                  none            local: DRAM of each instance   ems: one pool that all instances reach
    cold start    n * fetch       n * fetch                      fetch
    warm start    (never)         load                           load
    DRAM copies   0               n                              1                of each model that all run
    hit rate      0               min(1, k / m)                  min(1, k / m)    k per instance, k in the pool
    switch        fetch           hit * load + (1 - hit) * fetch, one instance, to a random one of the m

A fetch passes through DRAM into the NPUs, and its parts overlap: where L is below B, load stands for fetch.
"""

from dataclasses import dataclass
from typing import Literal

from devices.spec import StorageSpec

ModelCache = Literal["none", "local", "ems"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoading:
    """What it costs to start all instances with one model, and to switch one of them to another."""

    cold_start_s: float
    warm_start_s: float | None  # None without a cache: there is no warm start
    dram_copies: int  # of one model that all instances run
    dram_bytes: float  # that the caches take up when they are full
    hit_rate: float  # of a switch to a random one of the models
    switch_s: float  # mean


def load_model_time(
    storage: StorageSpec,
    *,
    model_bytes: float,
    num_instances: int,
    num_models: int,
    cache: ModelCache,
    cached_models: int | None = None,
) -> ModelLoading:
    """Times of loading and switching among `num_models` models of `model_bytes` each.

    `cached_models` is what one cache holds: by default 1 for the local one of an instance, and all models for EMS, as
    in table 2. Raises ValueError for a size or number out of range.
    """
    for name, value in (("model_bytes", model_bytes), ("num_instances", num_instances), ("num_models", num_models)):
        if not value > 0:
            raise ValueError(f"{name}: {value} must be above 0")
    if cache == "none" and cached_models is not None:
        raise ValueError(f"cached_models: {cached_models} without a cache")
    if cached_models is None:
        cached_models = {"none": 0, "local": 1, "ems": num_models}[cache]
    elif cached_models < 1:
        raise ValueError(f"cached_models: {cached_models} must be at least 1")
    load_s = model_bytes / storage.model_load_bytes_per_s
    one_fetch_s = model_bytes / storage.bucket_bytes_per_s
    num_fetches = 1 if cache == "ems" else num_instances
    num_caches = {"none": 0, "local": num_instances, "ems": 1}[cache]
    hit_rate = min(1.0, cached_models / num_models)
    return ModelLoading(
        cold_start_s=max(load_s, num_fetches * one_fetch_s),
        warm_start_s=None if cache == "none" else load_s,
        dram_copies=num_caches,
        dram_bytes=num_caches * min(cached_models, num_models) * model_bytes,
        hit_rate=hit_rate,
        switch_s=hit_rate * load_s + (1 - hit_rate) * max(load_s, one_fetch_s),
    )
