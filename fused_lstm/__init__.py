"""A drop-in torch.nn.LSTM on fused Triton kernels."""
