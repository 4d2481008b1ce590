"""A run in several one-thread processes, watched by the one that started them.

Owns: starting and ending the processes, their reports, and stopping at a step that all agree on.
Must not know: what a step computes, files of the published format.

One-thread processes share two cores without losing time to each other's threads; each computes its shards of a step,
and the sums go through gloo on the loopback interface.
"""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Event
from pathlib import Path

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.training.held_out import Accuracy, held_out_accuracy
from model.training.settings import TrainingSettings
from model.training.trainer import ResumeError, StepReport, Trainer

STATE_FILE = "state.pt"
_SAVE_EVERY = 100
_JOIN_SECONDS = 30.0

# Large tensors come and go in every step. By default glibc gives each one's pages back to the kernel and faults them
# in again, which took a third of a step; these keep them.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


class TrainingError(RuntimeError):
    """A training process ended before its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What every process of a run is told."""

    config: ModelConfig
    settings: TrainingSettings
    tokenizer_file: Path
    directory: Path  # holds STATE_FILE
    processes: int
    evaluate_every: int  # steps; 0 = never


Report = StepReport | Accuracy


def run_processes(run: Run, on_report: Callable[[Report], None]) -> bool:
    """Train from the saved state, or from the start, until the end or Ctrl-C; True when it is finished.

    Raises ResumeError if the state belongs to another run, or is none; TrainingError if a process dies.
    """
    assert run.processes <= run.settings.num_shards, "a process without a shard"
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    receivers, workers = [], []
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as meeting:
        os.environ.update(_MALLOC, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
        # Ctrl-C reaches the whole process group: blocked from here on, in the children until they ignore it.
        previous = signal.signal(signal.SIGINT, lambda number, frame: stop.set())
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for rank in range(run.processes):
                receiver, sender = context.Pipe(duplex=False)
                worker = context.Process(target=_work, args=(run, rank, f"{meeting}/store", stop, sender), daemon=True)
                worker.start()
                sender.close()
                receivers.append(receiver)
                workers.append(worker)
        finally:
            os.environ.clear()
            os.environ.update(before)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            return _watch(receivers, on_report)
        finally:
            signal.signal(signal.SIGINT, previous)
            stop.set()
            for worker in workers:
                worker.join(_JOIN_SECONDS)
                worker.kill()


def _watch(receivers: list[Connection], on_report: Callable[[Report], None]) -> bool:
    """Pass reports on until every process has said how it ended."""
    is_finished, open_receivers = False, list(receivers)
    while open_receivers:
        for receiver in wait(open_receivers):
            assert isinstance(receiver, Connection)
            try:
                message = receiver.recv()
            except EOFError:
                raise TrainingError("a training process died; the last saved state can be resumed") from None
            if isinstance(message, bool):
                is_finished = message
                open_receivers.remove(receiver)
            elif isinstance(message, Exception):
                raise message
            else:
                on_report(message)
    return is_finished


def _work(run: Run, rank: int, store: str, stop: Event, sender: Connection) -> None:
    """One process's life: Ctrl-C is the parent's to handle, so that all processes stop after the same step."""
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(1)
    if run.processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=run.processes)
    try:
        sender.send(_steps(run, rank, stop, sender))
    except ResumeError as error:
        sender.send(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _steps(run: Run, rank: int, stop: Event, sender: Connection) -> bool:
    tokenizer = Tokenizer.from_file(run.tokenizer_file)
    trainer = Trainer(run.config, run.settings, tokenizer)
    state = run.directory / STATE_FILE
    if state.exists():
        trainer.resume(state)
    is_stopped = False
    while not trainer.is_finished and not is_stopped:
        report, is_stopped = trainer.run_step(wants_stop=stop.is_set())
        if rank > 0:
            continue
        sender.send(report)
        is_last = trainer.is_finished or is_stopped
        if run.evaluate_every and (trainer.step % run.evaluate_every == 0 or trainer.is_finished):
            accuracy = held_out_accuracy(trainer.network, trainer.weights, tokenizer, step=trainer.step)
            trainer.accuracies.append(accuracy.as_dict())
            sender.send(accuracy)
        if is_last or trainer.step % _SAVE_EVERY == 0:
            trainer.save(state)
    return trainer.is_finished
