"""Search indexes over the keys; the only package that imports FAISS."""
