"""All figures of docs/performance.md: `make bench`."""

from tests.bench import bench_all_to_all, bench_serving, bench_simulate

for title, bench in (
    ("simulate", bench_simulate),
    ("live cluster against transformers", bench_serving),
    ("all-to-all between processes", bench_all_to_all),
):
    print(f"\n== {title}", flush=True)
    bench.main()
