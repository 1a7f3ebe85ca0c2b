"""An adapter pool: many adapters for one model, with storage tiers, leases, and hot swapping."""

from fastlora.ops.factors import Factors
from fastlora.pool.leases import Lease
from fastlora.pool.pool import AdapterPool, pool_of
from fastlora.pool.records import PoolStats, Resident

__all__ = ["AdapterPool", "Factors", "Lease", "PoolStats", "Resident", "pool_of"]
