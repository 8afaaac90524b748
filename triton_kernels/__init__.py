"""Triton kernels of attn_gate, installed as `attn_gate.triton_kernels`."""
