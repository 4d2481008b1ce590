"""A run that is over is freed at once: a sweep of many runs must not keep them until a garbage collection."""

import gc
import weakref

from serving.simulation import assembly
from serving.simulation.fast import run_fast
from serving.workloads.load import load_workload


def test_nothing_of_a_run_is_left_without_a_garbage_collection(make_config, monkeypatch):
    config, kept = make_config("laptop"), []
    original = assembly.build_pool_index

    def watched(config):
        index = original(config)
        kept.append(weakref.ref(index))
        return index

    monkeypatch.setattr(assembly, "build_pool_index", watched)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        run_fast(config, load_workload(config))
        assert len(kept) == 1
        assert kept[0]() is None
        assert not gc.isenabled()
    finally:
        if was_enabled:
            gc.enable()
