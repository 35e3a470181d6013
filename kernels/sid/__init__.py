"""Triton kernels for Semantic IDs; the folder imports torch and triton only."""
