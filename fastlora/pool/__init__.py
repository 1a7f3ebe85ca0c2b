"""An adapter pool: many adapters for one model, with storage tiers, leases, and hot swapping."""

from fastlora.deprecation import renamed_attributes
from fastlora.ops.factors import Factors
from fastlora.pool.leases import Lease
from fastlora.pool.pool import AdapterPool, pool_of
from fastlora.pool.records import LoadedAdapter, PoolStats

__all__ = ["AdapterPool", "Factors", "Lease", "PoolStats", "LoadedAdapter", "pool_of"]

__getattr__ = renamed_attributes(__name__, {"Resident": "LoadedAdapter"})
