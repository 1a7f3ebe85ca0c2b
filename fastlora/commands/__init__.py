"""The `fastlora` command line, which uses all parts of the library."""
