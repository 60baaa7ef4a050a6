"""Random-basis projection and reconstruction for federated full-parameter tuning (Ferret, arXiv 2409.06277).

    gamma = ferret_ext.project(delta, seed, K)             # the update as K numbers
    rebuilt = ferret_ext.reconstruct(gamma, seed, delta.shape)

`BlockPlan`, `project_difference` and `apply_` do the same for whole models; `ferret_ext.federated` runs the
rounds.
"""

from . import _native
from .ops import (
    apply_,
    basis,
    cpu_capability,
    project,
    project_difference,
    reconstruct,
    reconstruct_,
    set_cpu_isa,
)
from .plan import Block, BlockPlan

__version__: str = _native.version

__all__ = [
    "Block",
    "BlockPlan",
    "__version__",
    "apply_",
    "basis",
    "cpu_capability",
    "project",
    "project_difference",
    "reconstruct",
    "reconstruct_",
    "set_cpu_isa",
]
