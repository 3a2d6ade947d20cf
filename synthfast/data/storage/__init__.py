"""Folders on this machine and at URLs: reading, writing, a cache of what was fetched, and locks."""
