"""The `fastlora` command: what a terminal starts, over the whole library."""
