"""Speed of `simulate laptop`: simulated seconds per wall second, start of the process excluded and included."""

import subprocess
import sys
import time

from serving.config_file import load_config
from serving.simulation.run import simulate
from serving.workloads.load import load_workload


def main() -> None:
    config = load_config("laptop", ["workload.num_requests=2000"])
    result = simulate(config, load_workload(config))
    print(
        f"2000 requests: {result.simulated_s:.1f} simulated s in {result.wall_s:.2f} s: "
        f"{result.simulated_s / result.wall_s:.0f} times real time (bar: 100)"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "serving.cli", "simulate", "laptop"], stdout=subprocess.DEVNULL, check=True)
    print(f"`supernode simulate laptop` as a command: {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main()
