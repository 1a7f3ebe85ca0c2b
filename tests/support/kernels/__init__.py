"""What tests of kernels share: problems with their truths, and a quicker interpreter."""
