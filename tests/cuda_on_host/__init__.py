"""The CUDA kernels compiled for the host, where every thread is a fiber: see cuda_on_host.h."""
