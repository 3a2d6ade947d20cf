"""Shard folders: the manifest, writing that survives any interruption, and reading."""
