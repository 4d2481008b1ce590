"""One all-to-all between processes of this host, a rank in each: torch tensors in, torch tensors out.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_all_to_all [shared_memory | borrowed | gloo ...] [--processes 2 4 8]

Every rank sends the given bytes in all, an equal part to each rank, itself included. The table has the minimum, median
and 90th percentile of rank 0's time for one exchange, back to back, of the repetition with the least median; then the
host's load.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WIDTH = 16  # float32 columns of a row
NUM_WARM = 50
FOLDER = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


def _join(kind: str, rank: int, world_size: int, bytes_per_rank: int, place: str) -> Any:
    ranks_by_process = tuple((r,) for r in range(world_size))
    if kind == "gloo":
        from serving.gloo_exchange import GlooExchange, GlooGroupSpec

        host, port = place.split(":")
        spec = GlooGroupSpec(
            store_host=host,
            store_port=int(port),
            world_size=world_size,
            ranks_by_process=ranks_by_process,
            timeout_s=60,
            epoch=bytes_per_rank,
        )
        return GlooExchange(spec, rank)
    import torch

    from serving.shared_memory import SharedMemoryExchange, WindowGroupSpec

    windows = WindowGroupSpec(
        path=f"{place}-{bytes_per_rank}",
        world_size=world_size,
        ranks_by_process=ranks_by_process,
        window_bytes=max(bytes_per_rank // world_size, 4 * WIDTH),
        timeout_s=60,
        epoch=0,
    )
    return SharedMemoryExchange(windows, rank, from_array=torch.from_numpy, borrow=kind == "borrowed")


def _rank(
    kind: str, rank: int, world_size: int, sizes: list[int], num_exchanges: int, place: str, result: Connection
) -> None:
    import torch

    from model.collectives import AllToAll

    torch.set_num_threads(1)
    for bytes_per_rank in sizes:
        rows = max(1, bytes_per_rank // world_size // (4 * WIDTH))
        call = AllToAll([torch.full((rows, WIDTH), float(rank)) for _ in range(world_size)])
        times_ns = []
        with _join(kind, rank, world_size, bytes_per_rank, place) as exchange:
            for _ in range(NUM_WARM + num_exchanges):
                start_ns = time.perf_counter_ns()
                (reply,) = exchange.exchange([call])
                times_ns.append(time.perf_counter_ns() - start_ns)
            assert [float(tensor[-1, -1]) for tensor in reply] == list(range(world_size))
        if rank == 0:
            result.send(times_ns[NUM_WARM:])


def measure(kind: str, world_size: int, sizes: list[int], num_exchanges: int) -> list[list[int]]:
    """Nanoseconds of every exchange of rank 0, for each number of bytes per rank."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    store = None
    if kind == "gloo":
        from serving.gloo_exchange import start_store

        store = start_store("127.0.0.1")
        place = f"127.0.0.1:{store.port}"
    else:
        place = str(FOLDER / f"supernode-bench-{os.getpid()}")
    processes = [
        context.Process(target=_rank, args=(kind, rank, world_size, sizes, num_exchanges, place, theirs))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    theirs.close()
    times = [ours.recv() for _ in sizes]
    for process in processes:
        process.join()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("kinds", nargs="*", default=["shared_memory", "borrowed", "gloo"])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--kilobytes", type=int, nargs="+", default=[1, 64, 1024], help="sent by each rank")
    parser.add_argument("--exchanges", type=int, default=500)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    print(f"{'exchange':14} {'processes':>9} {'KB/rank':>8} {'min ms':>8} {'median ms':>9} {'p90 ms':>8} {'load':>5}")
    for kind in options.kinds:
        for world_size in options.processes:
            sizes = [1024 * kilobytes for kilobytes in options.kilobytes]
            runs = [measure(kind, world_size, sizes, options.exchanges) for _ in range(options.repetitions)]
            for position, size in enumerate(sizes):
                times_ns = sorted(min((run[position] for run in runs), key=statistics.median))
                least, median = times_ns[0], statistics.median(times_ns)
                p90 = times_ns[len(times_ns) * 9 // 10]
                print(
                    f"{kind:14} {world_size:9} {size // 1024:8} {least / 1e6:8.3f} {median / 1e6:9.3f} "
                    f"{p90 / 1e6:8.3f} {os.getloadavg()[0]:5.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
