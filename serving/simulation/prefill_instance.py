"""One prefill instance of a run in virtual time: its steps one after the other.

Owns: when steps begin and end, what they are charged, what is written down of them.
Must not know: the life of a request beyond its prompt, routing, the pool.
"""

from collections.abc import Callable

from devices.fabric import Endpoint
from devices.step_work import StepTime
from serving.core.prompt_batcher import FindExternal, Prompt, PromptBatcher, PromptStep
from serving.simulation.event_loop import EventLoop
from serving.simulation.step_notes import StepNotes

ChargePrompts = Callable[[int, int, int, int, int], StepTime]
"""Time of a step by its tokens, token pairs, cached tokens to read, rows and samples, all dies together."""


class PrefillInstance:
    """Steps while there is something to compute. `index` is its place among all instances."""

    def __init__(
        self,
        *,
        index: int,
        batcher: PromptBatcher,
        charge: ChargePrompts,
        dies: list[Endpoint],
        loop: EventLoop,
        notes: StepNotes,
        find_external: FindExternal | None,
        on_admit: Callable[[Prompt, int, int], None],
        on_computed: Callable[[Prompt], None],
    ) -> None:
        """`on_admit(prompt, num_cached, num_external)` and `on_computed(prompt)` are called in the step's order.

        With `num_external` tokens to come from the pool the prompt waits for `activate`.
        """
        self.index = index
        self.instance_id = notes.instance_id
        self.notes = notes
        self.batcher = batcher
        self.dies = dies
        self.num_runs = 0  # requests that wait for this instance
        self._charge = charge
        self._loop = loop
        self._find_external = find_external
        self._on_admit = on_admit
        self._on_computed = on_computed
        self._is_stepping = False
        self._is_woken = False

    def add(self, prompt: Prompt) -> None:
        """Queue a request's prompt."""
        self.num_runs += 1
        self.batcher.add(prompt)
        self.wake()

    def activate(self, prompt: Prompt, num_computed: int) -> None:
        """What was to be loaded has come."""
        self.batcher.activate(prompt, num_computed)
        self.wake()

    def release(self, prompt: Prompt) -> None:
        """Free the blocks of a prompt that was computed."""
        self.batcher.release(prompt)
        if self.num_runs:
            self.wake()

    def wake(self) -> None:
        """Look for work at this instant, unless a step is under way."""
        if not self._is_stepping and not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self._step, None)

    def _step(self, _: None) -> None:
        self._is_woken = False
        loop, batcher = self._loop, self.batcher
        while (step := batcher.schedule(self._find_external)) is not None:
            external = dict.fromkeys((id(prompt) for prompt, _ in step.admitted), 0)
            external |= {id(prompt): num_tokens for prompt, num_tokens in step.loads}
            for prompt, num_cached in step.admitted:
                self._on_admit(prompt, num_cached, external[id(prompt)])
            if step.rows:
                break
        else:
            self._is_stepping = False
            return
        self._is_stepping = True
        num_tokens = num_context = num_kv = num_samples = 0
        for prompt, size in zip(step.rows, step.sizes, strict=True):
            end = prompt.num_computed + size
            num_tokens += size
            num_context += size * prompt.num_computed + size * (size + 1) // 2
            num_kv += end
            num_samples += end >= prompt.num_tokens
        time = self._charge(num_tokens, num_context, num_kv, len(step.rows), num_samples)
        rows = (len(step.rows),)
        self.notes.add(
            (loop.now_ns,),
            (time,),
            num_seqs=rows,
            num_tokens=(num_tokens,),
            num_sampled=(num_samples,),
            num_joined=rows,  # a prompt has no tokens but its last step's
            num_waiting=(batcher.num_waiting,),
            num_used_blocks=(batcher.num_used_blocks,),
            max_kv_tokens=(num_kv,),
        )
        loop.call_at(loop.now_ns + time.ns, self._end, step)

    def _end(self, step: PromptStep) -> None:
        for prompt in self.batcher.update(step):
            self.num_runs -= 1
            self._on_computed(prompt)
        self._step(None)
