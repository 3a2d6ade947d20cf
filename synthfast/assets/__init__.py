"""Package data: the embedded default data set and model. README.md beside this file says where each comes from."""
