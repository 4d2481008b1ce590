"""The scheduler of a prefill instance where only counts are known: BatchScheduler's rules for one rank, without arrays.

Owns: slots and blocks of the instance, who waits, and what each step computes of which prompt.
Must not know: time, transfers, the shared pool's contents, what a step costs.
Source: the rules are those of core/step_plan.py for one rank and requests that end with their first token, so nobody
outgrows his blocks and nobody is preempted. A step has few rows: a loop over them costs less than arrays.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serving.core.block_pool import NO_BLOCKS, BlockPool
from serving.core.ids import BlockHash, BlockIds

Key = tuple[int, int]


@dataclass(slots=True, eq=False)
class Prompt:
    """A request at its prefill instance: `num_tokens` are to be computed, and one more comes out."""

    owner: object
    num_tokens: int
    key: Key  # priority and order
    block_hashes: Sequence[BlockHash] = ()
    num_computed: int = 0
    slot: int = -1
    num_blocks: int = 0
    block_ids: BlockIds = field(default_factory=lambda: NO_BLOCKS)  # where the instance caches prefixes
    num_hashed_blocks: int = 0
    is_ready: bool = False


@dataclass(slots=True, eq=False)
class PromptStep:
    """One step: `rows` compute `sizes` tokens. `loads` were admitted and wait for so many tokens from the pool."""

    rows: list[Prompt]
    sizes: list[int]
    admitted: list[tuple[Prompt, int]]  # and how many tokens the instance's own blocks had
    loads: list[tuple[Prompt, int]]  # and how many tokens are to come


FindExternal = Callable[[Prompt], int]


class PromptBatcher:
    """One prefill instance with `num_blocks` blocks, `max_num_seqs` slots, `max_num_batched_tokens` per step."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool,
    ) -> None:
        self.num_blocks = num_blocks
        self.num_free_blocks = num_blocks  # where no prefixes are cached; else the pool counts
        self._block_size = block_size
        self._max_tokens = max_num_batched_tokens
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._waiting: list[tuple[Key, Prompt]] = []
        self._ready: list[Prompt] = []
        self._pool: BlockPool | None = None
        if enable_prefix_caching:
            self._pool = BlockPool(num_blocks=num_blocks, block_size=block_size)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that requests hold."""
        return self.num_blocks - (self.num_free_blocks if self._pool is None else self._pool.num_free)

    def num_prefix_tokens(self, hashes: Sequence[BlockHash]) -> int:
        """Tokens of this prefix that the instance's own blocks hold now."""
        return 0 if self._pool is None else len(self._pool.find_prefix(hashes)) * self._block_size

    def add(self, prompt: Prompt) -> None:
        """Let a request wait for its admission."""
        heapq.heappush(self._waiting, (prompt.key, prompt))

    def activate(self, prompt: Prompt, num_computed: int) -> None:
        """What was to be loaded has come, up to `num_computed` tokens: let it run."""
        prompt.num_computed = num_computed
        prompt.is_ready = True
        self._ready.append(prompt)
        self._cache_full_blocks(prompt)

    def release(self, prompt: Prompt) -> None:
        """Free the blocks of a request whose prompt is computed, once nobody reads them."""
        if self._pool is None:
            self.num_free_blocks += prompt.num_blocks
        else:
            self._pool.free(prompt.block_ids)

    def schedule(self, find_external: FindExternal | None) -> PromptStep | None:
        """Decide the next step; None if there is nothing to do and nothing to report.

        `find_external(prompt)` tells how many tokens of its prefix the shared pool holds; None: there is no pool.
        """
        step = PromptStep([], [], [], [])
        budget = self._max_tokens
        if self._ready:
            budget = self._continue(step, budget)
        while self._waiting and self._free_slots:
            prompt = self._waiting[0][1]
            taken = self._try_admit(prompt, budget, step, find_external)
            if taken is None:
                break
            heapq.heappop(self._waiting)
            budget -= taken
        return step if step.rows or step.admitted else None

    def update(self, step: PromptStep) -> list[Prompt]:
        """The step has run; returns the prompts that are computed. Their blocks are held until `release`."""
        finished = []
        for prompt, size in zip(step.rows, step.sizes, strict=True):
            prompt.num_computed += size
            self._cache_full_blocks(prompt)
            if prompt.num_computed >= prompt.num_tokens:
                finished.append(prompt)
        for prompt in finished:
            self._ready.remove(prompt)
            self._free_slots.append(prompt.slot)
        return finished

    def _continue(self, step: PromptStep, budget: int) -> int:
        """Rows of one token first, by slot; then longer ones, by key, in chunks."""
        longer = []
        for prompt in sorted(self._ready, key=lambda prompt: prompt.slot):
            if prompt.num_tokens - prompt.num_computed == 1:
                step.rows.append(prompt)
                step.sizes.append(1)
                budget -= 1
            else:
                longer.append(prompt)
        for prompt in sorted(longer, key=lambda prompt: prompt.key):
            size = min(prompt.num_tokens - prompt.num_computed, budget)
            if size:
                step.rows.append(prompt)
                step.sizes.append(size)
                budget -= size
        return budget

    def _try_admit(
        self, prompt: Prompt, budget: int, step: PromptStep, find_external: FindExternal | None
    ) -> int | None:
        """Tokens of the budget that it takes; None if it is not admitted."""
        if not budget and find_external is None:
            return None
        size, pool = self._block_size, self._pool
        num_usable = (prompt.num_tokens - 1) // size
        prefix = NO_BLOCKS if pool is None else pool.find_prefix(prompt.block_hashes[:num_usable])
        num_cached = len(prefix) * size
        num_external = 0
        if find_external is not None:
            num_external = max(0, min(find_external(prompt) // size, num_usable) * size - num_cached)
        if not budget and not num_external:
            return None
        num_new = -(-prompt.num_tokens // size) - len(prefix)
        if pool is None:
            if num_new > self.num_free_blocks:
                return None
            self.num_free_blocks -= num_new
        else:
            if num_new > pool.num_free_beside(prefix):
                return None
            prompt.block_ids = pool.allocate(num_new, prefix=prefix)
        prompt.num_blocks = num_new + len(prefix)
        prompt.slot = self._free_slots.pop()
        prompt.num_computed = num_cached
        prompt.num_hashed_blocks = num_cached // size
        step.admitted.append((prompt, num_cached))
        if num_external:
            step.loads.append((prompt, num_external))
            return 0
        prompt.is_ready = True
        self._ready.append(prompt)
        taken = min(prompt.num_tokens - num_cached, budget)
        step.rows.append(prompt)
        step.sizes.append(taken)
        return taken

    def _cache_full_blocks(self, prompt: Prompt) -> None:
        """Let others find the blocks that it has filled with hashed tokens."""
        if self._pool is None:
            return
        start = prompt.num_hashed_blocks
        end = min(prompt.num_computed // self._block_size, len(prompt.block_hashes))
        if end > start:
            self._pool.cache_full_blocks(prompt.block_ids[start:end], prompt.block_hashes[start:end])
            prompt.num_hashed_blocks = end
