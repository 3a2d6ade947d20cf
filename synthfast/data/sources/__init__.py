"""Where images come from: one name for each source, and readers of the published layouts."""
