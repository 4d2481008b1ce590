"""Seconds of dispatch and combine: token copies on their way to experts and back.

Owns: fused dispatch and combine (decode: vector cores write into other dies' memory, or hand copies to their NIC) and
bulk all-to-alls (prefill: SDMA, or kernels on some of the cores).
Must not know: what experts compute, how a step overlaps it.
Source: protocol and message sizes of arXiv 2506.12708v2, section 4.2.1; its tables 1 and 7; sgl-kernel-npu README. On
GPUs: deepseek-ai/DeepEP, README and tests.

With T tokens per die, K copies each, message bytes b and a write bandwidth w, fused:

    copies to far dies   n = T * K * (1 - near dies / EP)      near: in the package, or in the node over NVLink
    dispatch   n * (b / w + copy) / drive + fixed + EP / vector cores * latency        counts and flags, rank by rank
    combine    n' * (b / w + copy) / drive + launch + latency                          flags ride on the data

`copy` is what a die's vector cores spend on one copy beside its bytes (0 where a NIC sends it). `drive` is the share of
that pace that some of them reach: it saturates, 1 - 0.05 ** (cores / cores for 95 %). Copies to near dies go the same
way at the same time, over their own link. Dispatch is paced by the senders, unless the hottest receiver's port takes
longer; combine by the die that has most to send back, which is the hottest: n' is its number of copies.
"""

import math
from functools import lru_cache

import numpy as np

from devices.deployment import ExpertDeployment
from devices.spec import SupernodeSpec
from model import work
from model.config import ModelConfig

REMEMBERED = 4096  # pairs of numbers of tokens, the latest used


class ExpertParallel:
    """Communication of one deployment's experts."""

    def __init__(self, config: ModelConfig, supernode: SupernodeSpec, deployment: ExpertDeployment) -> None:
        rates, fitted = supernode.rates, supernode.fitted
        plane = supernode.planes[rates.ep_plane]
        write = plane.paths["npu_npu", "write", "inter"]
        # Bulk copies reach their die over the scale-up plane. Where that ends at the node, a peer relays them.
        scale_up = supernode.planes["ub"].paths
        receive = scale_up.get(("npu_npu", "read", "inter")) or scale_up["npu_npu", "read", "intra"]
        self._ep = ep = deployment.ep
        self._dispatch_bytes = work.dispatch_message_bytes(config, scale_bytes=rates.ep_scale_bytes)
        self._combine_bytes = work.combine_message_bytes(config)
        dispatched_shared = config.n_shared_experts if deployment.is_shared_dispatched else 0
        self._copies_per_token = config.num_experts_per_tok + dispatched_shared
        self._top_k = config.num_experts_per_tok
        self._shared_copies_per_token = 0.0  # on a die of the shared expert
        if deployment.is_shared_dispatched:
            self._shared_copies_per_token = dispatched_shared * ep / deployment.num_shared_slots
        near_dies, near = supernode.npu.num_dies, supernode.npu.die_to_die
        if rates.ep_near == "node":
            near_dies, near = near_dies * supernode.npus_per_node, scale_up["npu_npu", "write", "intra"]
        self._far_share = max(0.0, 1 - near_dies / ep)
        self._near_share = 1 - self._far_share - 1 / ep
        self._near_bytes_per_s = near.bytes_per_s
        self._write_bytes_per_s = write.bytes_per_s
        self._receive_bytes_per_s = receive.bytes_per_s
        self._port_bytes_per_s = plane.die_port_bytes_per_s
        self._latency_s = write.latency_ns * 1e-9
        self._launch_s = rates.launch_s
        self._near_copy_s, self._dispatch_fixed_s = fitted.ep_copy_s, fitted.dispatch_fixed_s
        self._far_copy_s = 0.0 if rates.ep_plane == "rdma" else fitted.ep_copy_s
        self._aiv_for_95_percent = rates.ep_aiv_for_95_percent
        bulk = rates.bulk_all_to_all
        at = math.log2(ep), np.log2(bulk.ep)
        self._bulk_dispatch_bytes_per_s = plane.die_port_bytes_per_s * float(np.interp(*at, bulk.dispatch_utilization))
        self._bulk_combine_bytes_per_s = plane.die_port_bytes_per_s * float(np.interp(*at, bulk.combine_utilization))
        self._routed_copies = lru_cache(REMEMBERED)(deployment.hottest_copies)
        self._paces = lru_cache(REMEMBERED)(self._paces_of)

    def num_copies(self, tokens: float) -> float:
        """Copies that a die sends for `tokens`: one for each chosen expert, and one to a dispatched shared expert."""
        return tokens * self._copies_per_token

    def hottest_copies(self, mean_tokens: float) -> float:
        """Copies that reach the hottest die when a die sends for `mean_tokens` on average."""
        routed = self._routed_copies(mean_tokens, self._top_k)
        return max(routed, mean_tokens * self._shared_copies_per_token)

    def dispatch(self, tokens: float, *, aiv: int, mean_tokens: float | None = None) -> float:
        """Fused dispatch by `aiv` vector cores: `tokens` of the die that has most, and the mean (None: all alike)."""
        if self._ep == 1:
            return 0.0
        dispatch, _ = self._paces(tokens, tokens if mean_tokens is None else mean_tokens)
        flags_s = self._ep / aiv * self._latency_s
        return self._driven_s(dispatch, aiv) + self._dispatch_fixed_s + flags_s

    def combine(self, tokens: float, *, aiv: int, mean_tokens: float | None = None) -> float:
        """Fused combine, the same way: the die that had most tokens has most to receive."""
        if self._ep == 1:
            return 0.0
        _, combine = self._paces(tokens, tokens if mean_tokens is None else mean_tokens)
        return self._driven_s(combine, aiv) + self._launch_s + self._latency_s

    def bulk_dispatch(self, tokens: float, *, mean_tokens: float | None = None) -> float:
        """Large all-to-all of prefill: at the measured rate, or as fast as the hottest die can take it."""
        return self._bulk(tokens, mean_tokens, self._dispatch_bytes, self._bulk_dispatch_bytes_per_s)

    def bulk_combine(self, tokens: float, *, mean_tokens: float | None = None) -> float:
        """And back."""
        return self._bulk(tokens, mean_tokens, self._combine_bytes, self._bulk_combine_bytes_per_s)

    def _paces_of(self, tokens: float, mean_tokens: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """Seconds to send, with all cores driving, and to receive: of dispatch, and of combine."""
        copies, hottest = self.num_copies(tokens), self.hottest_copies(mean_tokens)
        receive_dispatch_s = hottest * self._far_share * self._dispatch_bytes / self._port_bytes_per_s
        receive_combine_s = copies * self._far_share * self._combine_bytes / self._port_bytes_per_s
        return (
            (self._write_s(copies, self._dispatch_bytes), receive_dispatch_s),
            (self._write_s(hottest, self._combine_bytes), receive_combine_s),
        )

    def _driven_s(self, pace: tuple[float, float], aiv: int) -> float:
        send_s, receive_s = pace
        drive = 1 - math.exp(-math.log(20) * aiv / self._aiv_for_95_percent)
        return max(send_s / drive, receive_s)

    def _write_s(self, copies: float, message_bytes: int) -> float:
        far_s = copies * self._far_share * (message_bytes / self._write_bytes_per_s + self._far_copy_s)
        near_s = copies * self._near_share * (message_bytes / self._near_bytes_per_s + self._near_copy_s)
        return max(far_s, near_s)

    def _bulk(self, tokens: float, mean_tokens: float | None, message_bytes: int, bytes_per_s: float) -> float:
        if self._ep == 1:
            return 0.0
        fullest_s = self.num_copies(tokens) * message_bytes / bytes_per_s
        hottest = self.hottest_copies(tokens if mean_tokens is None else mean_tokens)
        return max(fullest_s, hottest * message_bytes / self._receive_bytes_per_s) + self._latency_s
