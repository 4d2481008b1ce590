"""Requests that sample, each with the parameters of another corner: (name, prompt tokens, prompt seed, parameters)."""

SAMPLED = (
    ("r0", 12, 0, {"max_tokens": 10, "temperature": 1.0, "seed": 7}),
    ("r1", 30, 1, {"max_tokens": 8, "temperature": 0.7, "top_p": 0.8, "seed": 2**64 - 1}),
    ("r2", 12, 0, {"max_tokens": 10, "temperature": 1.0, "seed": 8}),
    ("r3", 9, 3, {"max_tokens": 9, "temperature": 2.0, "top_k": 5, "seed": 0}),
    ("r4", 9, 4, {"max_tokens": 9, "temperature": 0.0}),
    ("r5", 12, 5, {"max_tokens": 40, "temperature": 2.0, "seed": 5, "ignore_eos": False, "min_tokens": 6}),
)
