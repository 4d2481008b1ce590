"""Serving: the control plane (router, schedulers, pool, prefill-decode hand-over), its endpoint and its tools."""
