"""Table 2 of the paper, and what follows from its arithmetic."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.model_loading import ModelCache, ModelLoading, load_model_time
from devices.spec import StorageSpec, SupernodeSpec

CACHES: list[ModelCache] = ["none", "local", "ems"]
STORAGE = StorageSpec(bucket_bytes_per_s=2.0, model_load_bytes_per_s=100.0)


def table_2(supernode: SupernodeSpec, cache: ModelCache) -> ModelLoading:
    """DeepSeek 671B in INT8, 8 instances, 8 models."""
    assert supernode.storage is not None
    return load_model_time(supernode.storage, model_bytes=671e9, num_instances=8, num_models=8, cache=cache)


@pytest.mark.parametrize(
    ("cache", "cold_s", "warm_s", "copies", "hit_rate", "switch_s"),
    [  # arXiv 2506.12708v2, table 2
        ("none", 2560, None, 0, 0.0, 320),
        ("local", 2560, 5, 8, 0.125, 281),
        ("ems", 320, 5, 1, 1.0, 5),
    ],
)
def test_table_2(
    supernode: SupernodeSpec,
    cache: ModelCache,
    cold_s: float,
    warm_s: float | None,
    copies: int,
    hit_rate: float,
    switch_s: float,
) -> None:
    ours = table_2(supernode, cache)
    assert ours.cold_start_s == pytest.approx(cold_s, rel=0.001)
    assert ours.warm_start_s == (None if warm_s is None else pytest.approx(warm_s))
    assert ours.dram_copies == copies
    assert ours.hit_rate == hit_rate
    assert ours.switch_s == pytest.approx(switch_s, rel=0.002)


def test_both_caches_of_table_2_take_the_same_dram(supernode: SupernodeSpec) -> None:
    assert [table_2(supernode, cache).dram_bytes for cache in CACHES] == [0, 8 * 671e9, 8 * 671e9]


def test_the_bucket_is_below_its_limit(supernode: SupernodeSpec) -> None:
    assert supernode.storage is not None
    assert supernode.storage.bucket_bytes_per_s <= 2.5e9  # section 4.4


@pytest.mark.parametrize(
    ("cache", "cached_models", "expected"),
    [  # 3 instances, 4 models of 200 bytes: fetch 100 s, load 2 s
        ("local", 2, ModelLoading(cold_start_s=300, warm_start_s=2, dram_copies=3, dram_bytes=1200, hit_rate=0.5,
                                  switch_s=51)),
        ("ems", 3, ModelLoading(cold_start_s=100, warm_start_s=2, dram_copies=1, dram_bytes=600, hit_rate=0.75,
                                switch_s=26.5)),
        ("ems", 9, ModelLoading(cold_start_s=100, warm_start_s=2, dram_copies=1, dram_bytes=800, hit_rate=1.0,
                                switch_s=2)),
    ],
)  # fmt: skip
def test_a_cache_that_holds_some_of_the_models(cache: ModelCache, cached_models: int, expected: ModelLoading) -> None:
    ours = load_model_time(
        STORAGE, model_bytes=200, num_instances=3, num_models=4, cache=cache, cached_models=cached_models
    )
    assert ours == expected


def test_a_bucket_faster_than_loading_does_not_make_a_cold_start_faster_than_a_warm_one() -> None:
    fast = StorageSpec(bucket_bytes_per_s=1000.0, model_load_bytes_per_s=100.0)
    ours = load_model_time(fast, model_bytes=200, num_instances=1, num_models=2, cache="ems", cached_models=1)
    assert (ours.cold_start_s, ours.warm_start_s, ours.switch_s) == (2, 2, 2)


@given(
    model_bytes=st.floats(1, 1e13),
    num_instances=st.integers(1, 100),
    num_models=st.integers(1, 50),
    cached_models=st.integers(1, 60),
)
def test_more_cache_never_costs_time(
    model_bytes: float, num_instances: int, num_models: int, cached_models: int
) -> None:
    def ours(cache: ModelCache, cached: int | None) -> ModelLoading:
        return load_model_time(
            STORAGE,
            model_bytes=model_bytes,
            num_instances=num_instances,
            num_models=num_models,
            cache=cache,
            cached_models=cached,
        )

    none, local, ems = ours("none", None), ours("local", cached_models), ours("ems", cached_models)
    assert ems.cold_start_s <= local.cold_start_s <= none.cold_start_s
    assert ems.switch_s == local.switch_s <= none.switch_s  # of equally many models at hand
    assert ems.dram_bytes * num_instances == pytest.approx(local.dram_bytes)
    assert ours("local", cached_models + 1).switch_s <= local.switch_s
    assert local.warm_start_s is not None
    assert local.warm_start_s <= local.switch_s * (1 + 1e-12)
    assert math.isclose(ours("ems", num_models).switch_s, local.warm_start_s)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_bytes": 0}, "model_bytes: 0 must be above 0"),
        ({"num_instances": 0}, "num_instances: 0 must be above 0"),
        ({"num_models": -1}, "num_models: -1 must be above 0"),
        ({"cached_models": 0}, "cached_models: 0 must be at least 1"),
        ({"cache": "none", "cached_models": 3}, "cached_models: 3 without a cache"),
    ],
)
def test_numbers_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"model_bytes": 1.0, "num_instances": 1, "num_models": 1, "cache": "ems", **change}
    with pytest.raises(ValueError, match=message):
        load_model_time(STORAGE, **arguments)  # type: ignore[arg-type]
