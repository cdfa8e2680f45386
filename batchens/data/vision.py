"""Import torchvision's data sets, also where torchvision's compiled operators can't load.

torchvision's wheels on PyPI are built for CUDA. Beside a CPU-only torch their library doesn't load, and
`import torchvision` stops with `operator torchvision::nms does not exist`. Data sets need no operator, so it is enough
that the operators which torchvision looks up while it is imported are declared (seen with torch 2.13.0+cpu and
torchvision 0.28.0). Where the library does load, declaring them first would be the error: so only after a failure.
"""

import sys
from types import ModuleType

from torch import library as operators


def import_datasets() -> ModuleType:
    """Return the module `torchvision.datasets`. Importing it takes one to two seconds: call this only to download."""
    try:
        from torchvision import datasets
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        # A failed import leaves its submodules behind, and they would not be run again.
        for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
            del sys.modules[name]
        for operator in ("torchvision::nms", "torchvision::qnms"):
            operators.define(operator, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision import datasets
    return datasets
