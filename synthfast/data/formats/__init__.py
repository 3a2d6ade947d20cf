"""Bytes of images and arrays: npy, png, jpg, and the tars of WebDataset with DALI's index."""
