"""Choosing synthetic images by their scores."""
