"""Random-basis projection and reconstruction for federated full-parameter tuning (Ferret, arXiv 2409.06277).

    gamma = ferret_ext.project(delta, seed, K)             # the update as K numbers
    rebuilt = ferret_ext.reconstruct(gamma, seed, delta.shape)

`BlockPlan`, `project_difference` and `apply_` do the same for whole models; `ferret_ext.federated` runs the
rounds.
"""

try:
    import ferret_ext._native as _native
except ModuleNotFoundError:
    raise ImportError(
        f"ferret_ext in {__path__[0]} has no native part: install it there with `pip install -e .`, "
        "or start Python outside the source tree to import an installed ferret_ext"
    ) from None

from .ops import (
    apply_,
    basis,
    cpu_capability,
    pack,
    project,
    project_difference,
    reconstruct,
    reconstruct_,
    set_cpu_isa,
    unpack,
)
from .packing import Packed, Packing
from .plan import Block, BlockPlan, PlanShard

__version__: str = _native.version

__all__ = [
    "Block",
    "BlockPlan",
    "Packed",
    "Packing",
    "PlanShard",
    "__version__",
    "apply_",
    "basis",
    "cpu_capability",
    "pack",
    "project",
    "project_difference",
    "reconstruct",
    "reconstruct_",
    "set_cpu_isa",
    "unpack",
]
