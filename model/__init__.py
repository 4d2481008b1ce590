"""A DeepSeek-R1-style model whose shards ask for communication as data. Knows nothing of devices, serving or time."""
