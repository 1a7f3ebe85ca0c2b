"""FSDP2; run by test_processes.py."""
