"""Scores of sets of images: ARC, FID, KID, precision, recall, density, coverage, and scores of single images."""
