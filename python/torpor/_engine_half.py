"""The engine's half, or one sentence that says what is missing.

_core links the libmlx that mlx.core loads: of another version it may not load, or load and crash.
"""

import sys

from . import _log, _store

try:
    from ._linked import MLX_VERSION, TORPOR_VERSION
except ImportError:
    raise ImportError("Torpor's engine is the distribution torpor, which is not installed beside torpor-store; "
                      f"run pip install torpor=={_store.VERSION}.") from None
if TORPOR_VERSION != _store.VERSION:
    raise ImportError(f"torpor {TORPOR_VERSION} needs torpor-store of its own version, but {_store.VERSION} is installed; "
                      f"run pip install torpor=={TORPOR_VERSION} torpor-store=={TORPOR_VERSION}.")
_PIP_MLX = f'pip install "mlx{"" if sys.platform == "darwin" else "[cpu]"}=={MLX_VERSION}"'
try:
    import mlx.core as _mx
except ImportError as error:
    raise ImportError(f"torpor needs mlx {MLX_VERSION}, which can't be imported ({error}); run {_PIP_MLX}.") from error
if _mx.__version__ != MLX_VERSION:
    raise ImportError(f"torpor is linked with mlx {MLX_VERSION}, but mlx {_mx.__version__} is installed; run {_PIP_MLX}, or "
                      "build torpor again from its source.")

from . import _core as _core

_log.join(_core)
