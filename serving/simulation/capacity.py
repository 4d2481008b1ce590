"""What instances of a configuration can do at most in a steady state, where a plan begins to search.

Owns: the questions to the what-if estimates that a configuration and mean lengths lead to.
Must not know: simulations, how a plan searches.

An estimate charges a die of the full-size instance; a live instance has as many of them as it has ranks.
"""

from typing import Any

from serving.config import RunConfig
from serving.errors import ConfigError
from serving.estimation.what_if import estimate


def decode_tokens_per_s(config: RunConfig, *, kv_len: int, tpot_ms: float) -> float:
    """Output tokens per second of one decode instance whose ranks are as full as TPOT, slots and KV space allow.

    0 where even one request per NPU takes longer; of requests that all have `kv_len` tokens.
    """
    section, num_dies = config.instances["decode"], config.hardware.npu.num_dies
    per_rank = min(section.max_num_seqs, section.num_blocks * config.cache.block_size // kv_len)
    best, low, high = 0.0, 1, max(1, per_rank) * num_dies
    while low <= high:
        batch = (low + high) // 2
        answer = _decode(config, kv_len=kv_len, batch_per_npu=batch)
        if answer is not None and answer["tpot_ms"] <= tpot_ms:
            best, low = max(best, answer["tokens_per_s_per_npu"]), batch + 1
        else:
            high = batch - 1
    return best / num_dies * config.world_size("decode")


def prefill_tokens_per_s(config: RunConfig, *, prompt_len: int) -> float:
    """Prompt tokens per second of one prefill instance that always has full batches and finds nothing in a cache."""
    section, num_dies = config.instances["prefill"], config.hardware.npu.num_dies
    per_npu = max(1, section.max_num_batched_tokens // config.world_size("prefill")) * num_dies
    charged = config.charged_instance("prefill").ep
    answer = _ask(
        "prefill",
        config,
        prompt_len=min(prompt_len, per_npu * charged // num_dies),
        tokens_per_npu=per_npu,
        ep=charged,
        mtp=config.speculative.num_speculative_tokens,
    )
    return 0.0 if answer is None else answer["tokens_per_s_per_npu"] / num_dies * config.world_size("prefill")


def _decode(config: RunConfig, *, kv_len: int, batch_per_npu: int) -> dict[str, Any] | None:
    return _ask(
        "decode",
        config,
        kv_len=kv_len,
        batch_per_npu=batch_per_npu,
        ep=config.charged_instance("decode").ep,
        mtp=config.speculative.num_speculative_tokens,
        acceptance=config.speculative.acceptance,
    )


def _ask(name: str, config: RunConfig, **arguments: Any) -> dict[str, Any] | None:
    """None where the estimate says that it cannot be: such a batch does not fit."""
    balance = config.timing.balance
    try:
        return estimate(
            name,
            hardware=config.hardware,
            model=f"{config.timing.model}",
            microbatch="on" if config.timing.microbatch else "off",
            balance="eplb" if balance == "measured" else balance,
            **arguments,
        )
    except ConfigError:
        return None
