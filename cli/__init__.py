"""The ``synthfast`` command. Files here parse and print; what is done is decided in the packages that they call."""
