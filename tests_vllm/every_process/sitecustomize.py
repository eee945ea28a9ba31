"""
Runs at the start of every Python process of these tests, vLLM's own included: this directory is on their `PYTHONPATH`.

torchvision is built for another torch than the CPU one, so its compiled operators are missing, and its import fails on
the first of them. No test calls them; declared, the import goes through.
"""

import sys
from importlib.abc import MetaPathFinder


class BeforeTorchvision(MetaPathFinder):
    """Declares the operators when torchvision is about to be imported, and finds nothing itself."""

    def find_spec(self, fullname, path, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare_operators()
        return None


def declare_operators() -> None:
    from torch.library import Library

    declared = Library("torchvision", "DEF")
    declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.modules[__name__].declared = declared  # the declarations live as long as it does


sys.meta_path.insert(0, BeforeTorchvision())
