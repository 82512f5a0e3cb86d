"""Triton kernels for CUDA tensors. Importing a module of this room imports triton; callers wait until they need it."""
