"""Speed and memory benchmarks of attn_gate, installed as `attn_gate.bench`."""
