"""Stores: where rows live."""

from hf_kvcache.stores.base import Store
from hf_kvcache.stores.buffer import RowBuffer
from hf_kvcache.stores.paged import PagedBuffer
from hf_kvcache.stores.ragged import RaggedStore
from hf_kvcache.stores.shared import SharedStore
from hf_kvcache.stores.uniform import UniformStore

__all__ = ["PagedBuffer", "RaggedStore", "RowBuffer", "SharedStore", "Store", "UniformStore"]
