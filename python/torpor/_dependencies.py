"""What must be there before _core is imported, or one sentence that says what is missing.

_core links the libmlx that mlx.core loads: of another version it may not load, or load and crash.
"""

import sys

from ._linked import MLX_VERSION

_PIP_MLX = f'pip install "mlx{"" if sys.platform == "darwin" else "[cpu]"}=={MLX_VERSION}"'

try:
    import mlx.core as _mx
except ImportError as error:
    raise ImportError(f"torpor needs mlx {MLX_VERSION}, which can't be imported ({error}); run {_PIP_MLX}.") from error
if _mx.__version__ != MLX_VERSION:
    raise ImportError(f"torpor is linked with mlx {MLX_VERSION}, but mlx {_mx.__version__} is installed; run {_PIP_MLX}, or "
                      "build torpor again from its source.")
try:
    import mlx_lm  # noqa: F401
except ImportError as error:
    raise ImportError(f'torpor needs mlx-lm, which can\'t be imported ({error}); run pip install "mlx-lm>=0.32.2,<0.33".') from error
