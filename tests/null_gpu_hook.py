"""Runs before a program on the null GPU (see null_gpu.py), which gives it the module `nullgpu`.

All values there are garbage, so checks that look at values are off.
"""

import math
import sys

sys.modules["nullgpu"] = nullgpu  # noqa: F821  for `import nullgpu`
math.isfinite = lambda number: True  # losses and norms
