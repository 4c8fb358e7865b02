"""One folder per fused operator: contract, one fp32 reference, CPU source and device sources. Tests import the
reference."""
