"""mlx-lm, whose caches are kept, or one sentence that says what is missing."""

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    raise ImportError("torpor needs mlx for mlx-lm's caches, which can't be imported "
                      f'({error}); run pip install "mlx[cpu]>=0.32".') from error
try:
    import mlx_lm  # noqa: F401
except ImportError as error:
    raise ImportError(f"torpor needs mlx-lm, which can't be imported ({error}); "
                      'run pip install "mlx-lm>=0.32.2,<0.33".') from error
