"""The prompt batcher decides as BatchScheduler does for one rank and requests that end with their first token."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core.batch_scheduler import BatchScheduler
from serving.core.ids import BlockHash, RequestId
from serving.core.prompt_batcher import Prompt, PromptBatcher, PromptStep
from serving.core.scheduled_batch import ScheduledBatch

BLOCK_SIZE = 4


@dataclass
class Both:
    """The two schedulers, driven alike; what they decide is compared at every step."""

    old: BatchScheduler
    new: PromptBatcher
    prompts: dict[str, Prompt]
    external: dict[str, int]
    loading: dict[str, int]
    held: list[str]

    def add(self, name: str, num_tokens: int, key: tuple[int, int], hashes: tuple[BlockHash, ...]) -> None:
        self.prompts[name] = Prompt(name, num_tokens, key, hashes)
        self.old.add(
            request_id=RequestId(name),
            rank=0,
            num_tokens=num_tokens,
            total_limit=num_tokens + 1,
            priority=key[0],
            order=key[1],
            block_hashes=hashes,
            num_external_tokens=lambda: self.external[name],
        )
        self.new.add(self.prompts[name])

    def step(self) -> bool:
        """One step of both; whether there was anything to do."""
        batch = self.old.schedule()
        step = self.new.schedule(lambda prompt: self.external[str(prompt.owner)])
        assert (batch is None) == (step is None)
        if batch is None or step is None:
            return False
        self._compare(batch, step)
        for load in batch.loads:
            self.loading[load.request_id] = load.num_cached_tokens + load.num_external_tokens
        if batch.num_rows:
            finished = self.old.update(batch).finished
            assert [prompt.owner for prompt in self.new.update(step)] == list(finished)
            self.held += finished
        return True

    def load_comes(self, share: float) -> None:
        for name, num_tokens in self.loading.items():
            arrived = int(num_tokens * share) // BLOCK_SIZE * BLOCK_SIZE
            arrived = max(arrived, self.prompts[name].num_computed)
            self.old.activate(request_id=RequestId(name), num_computed_tokens=arrived)
            self.new.activate(self.prompts[name], arrived)
        self.loading = {}

    def release(self) -> None:
        for name in self.held:
            self.old.release(RequestId(name))
            self.new.release(self.prompts[name])
        self.held = []

    def _compare(self, batch: ScheduledBatch, step: PromptStep) -> None:
        assert [prompt.owner for prompt in step.rows] == batch.request_ids.tolist()
        assert step.sizes == batch.num_scheduled_tokens.tolist()
        assert [(p.owner, cached) for p, cached in step.admitted] == [
            (admitted.request_id, admitted.num_cached_tokens) for admitted in batch.admitted
        ]
        assert [(p.owner, count) for p, count in step.loads] == [
            (load.request_id, load.num_external_tokens) for load in batch.loads
        ]
        assert self.new.num_waiting == self.old.num_waiting
        assert self.new.num_used_blocks == self.new.num_blocks - int(self.old.free_blocks[0])


@given(
    requests=st.lists(
        st.tuples(
            st.integers(1, 40),  # tokens
            st.integers(0, 2),  # priority
            st.integers(0, 3),  # which prefix it has
            st.integers(0, 40),  # tokens that the pool holds
            st.integers(0, 2),  # steps before it comes
        ),
        max_size=20,
    ),
    caching=st.booleans(),
    num_seqs=st.integers(1, 4),
    budget=st.integers(0, 20),
    share=st.floats(0, 1),
    spare_blocks=st.integers(0, 12),
)
@settings(max_examples=150, deadline=None)
def test_it_decides_as_the_scheduler_with_blocks(requests, caching, num_seqs, budget, share, spare_blocks):
    num_blocks, max_tokens = 10 + spare_blocks, num_seqs + budget
    both = Both(
        old=BatchScheduler(
            num_ranks=1,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=max_tokens,
            max_model_len=64,
            enable_prefix_caching=caching,
            policy="priority",
        ),
        new=PromptBatcher(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=max_tokens,
            enable_prefix_caching=caching,
        ),
        prompts={},
        external={},
        loading={},
        held=[],
    )
    for order, (num_tokens, priority, prefix, external, pause) in enumerate(requests):
        name = f"r{order}"
        both.external[name] = external
        hashes = tuple(BlockHash(1 + prefix * 100 + i) for i in range(num_tokens // BLOCK_SIZE))
        both.add(name, num_tokens, (priority, order), hashes)
        for _ in range(pause):
            both.step()
    for _ in range(200):
        if not both.step():
            both.load_comes(share)
            both.release()
            if not both.step() and not both.loading and not both.held:
                break
    assert both.new.num_waiting == 0
    both.release()
    both.old.check_invariants()
    assert both.new.num_used_blocks == 0
