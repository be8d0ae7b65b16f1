"""The equation p = λ p_kNN + (1 − λ) p_NMT, torch only: one file for each noun or method."""
