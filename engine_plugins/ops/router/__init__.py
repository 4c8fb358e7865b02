"""router: a BF16 GEMV that scores the experts."""
