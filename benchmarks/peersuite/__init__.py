"""Our engine beside others on the same files, prompts and threads: what `benchmarks/peers.py` is made of."""
