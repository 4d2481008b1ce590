"""A batch scheduler of a few blocks, with the calls that its tests make over and over."""

from typing import Any

import numpy as np
import pytest

from serving.core.batch_scheduler import BatchScheduler

SMALL = {
    "num_ranks": 1,
    "num_blocks": 10,
    "block_size": 4,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "max_model_len": 64,
}


class SteppedScheduler(BatchScheduler):
    """A scheduler that can be fed and stepped in one line."""

    def enter(self, request_id, num_tokens, max_tokens=4, *, rank=0, priority=0, order=None, **more: Any) -> None:
        """`add`; requests are called r0, r1, ... in the order of their arrival."""
        self.add(
            request_id=request_id,
            rank=rank,
            num_tokens=num_tokens,
            total_limit=num_tokens + max_tokens,
            priority=priority,
            order=int(request_id[1:]) if order is None else order,
            **more,
        )

    def hold(self, request_id, num_tokens, max_tokens=4, *, rank=0, order=0) -> list[int]:
        """`reserve`; returns the block ids."""
        block_ids = self.reserve(
            request_id=request_id,
            rank=rank,
            num_tokens=num_tokens,
            total_limit=num_tokens + max_tokens,
            priority=0,
            order=order,
        )
        return block_ids.tolist()

    @staticmethod
    def rows(batch):
        """(request, computed before, computed in this step, samples) of every row."""
        columns = (batch.request_ids, batch.num_computed_tokens, batch.num_scheduled_tokens, batch.samples)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def step(self, stop=()):
        """One whole step: its rows and who finished; None if there is nothing to do."""
        batch = self.schedule()
        if batch is None:
            return None
        mask = np.isin(batch.request_ids.astype(str), list(stop))
        finished = self.update(batch, mask).finished if batch.num_rows else ()
        self.check_invariants()
        return self.rows(batch), finished

    def run_until_idle(self, max_steps=200):
        """Step and release what finishes; returns the ids in the order in which they finished."""
        all_finished = []
        for _ in range(max_steps):
            result = self.step()
            if result is None:
                return all_finished
            for request_id in result[1]:
                self.release(request_id)
                all_finished.append(request_id)
        raise AssertionError(f"not idle after {max_steps} steps")


@pytest.fixture
def make_scheduler():
    """A function that makes a scheduler; limits can be changed by name."""
    return lambda **changes: SteppedScheduler(**{**SMALL, **changes})
