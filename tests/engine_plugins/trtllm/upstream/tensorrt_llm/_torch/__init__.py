"""As upstream: the PyTorch backend."""
