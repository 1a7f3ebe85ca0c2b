"""Faults that the tests must notice: `make faults` puts each one in and runs the tests it breaks.

Each module ``in_*`` has the faults of one part of the package, as a tuple ``FAULTS``. A change that
moves the code of a fault rewrites the fault in the same commit. Where a mechanism goes away, its
faults are replaced by those of what replaces it.
"""
