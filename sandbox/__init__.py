"""RUNS one job in one sealed box on one device, and measures it. Knows nothing of patches or merges."""
