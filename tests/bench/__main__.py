"""All figures of docs/performance.md: `make bench`."""

from tests.bench import bench_all_to_all, bench_estimate, bench_serving, bench_simulation, bench_trained

for title, bench in (
    ("simulate", bench_simulation),
    ("estimates", bench_estimate),
    ("live cluster against transformers", bench_serving),
    ("the trained model: drafts, INT8, training", bench_trained),
    ("all-to-all between processes", bench_all_to_all),
):
    print(f"\n== {title}", flush=True)
    bench.main()
