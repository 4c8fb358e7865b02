"""The CUDA kernels' shared header, C ABI and Python launcher; each kernel is `kernel.cuh` in its op's folder."""
