"""Modules over the kernels: ``nn.Module`` classes for quantized matrices, and the active task of a model."""
