"""The command fused-lstm: trains a model, times the kernels, says which backend runs."""
