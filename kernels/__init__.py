"""Triton kernels. They import only each other; fused_lstm imports them when a CUDA tensor arrives."""
