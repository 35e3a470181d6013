"""Triton kernels for Semantic IDs; each file stands alone and imports torch and triton only."""
