"""`python -m attn_gate demo`: see `attn_gate.demo.cli`."""
