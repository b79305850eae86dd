"""Paged attention on CUDA with Triton. Import it only where Triton is installed; TRITON_INTERPRET=1 runs it on CPU tensors.

attention     what to launch for a step, from host integers alone
write         rope, keys and values into the cache; the tiles of a step
rotate        rope of vectors as they are loaded
decode        sequences with one query row: split keys
prefill       sequences with several query rows: tiles of rows
softmax       the inner loop that both share
tree          the masks of token trees
copy_slots    keys and values from slot to slot, in all layers
launch        launches, or compiles for launches to come
configs       tile sizes: the tables to edit after a measurement
"""

from .attention import paged_attention
from .copy_slots import copy_slots, slot_table
from .launch import compiling

__all__ = ["compiling", "copy_slots", "paged_attention", "slot_table"]
