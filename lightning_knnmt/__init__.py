"""k-nearest-neighbor machine translation on PyTorch Lightning, made fast by angular dispersion."""

import os

# Torch and FAISS each bring OpenMP threads; spinning ones starve the other library when cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

__version__ = "0.1.0"
