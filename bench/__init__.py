"""Benchmarks; see README.md."""

import os

# As the command line sets it, for ours and the peers alike: large pages for tensors above 32 MB on a CPU.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
