"""The Numba kernels: the same bits as `runtime_ref.reference`, faster. Importing this package imports numba."""
