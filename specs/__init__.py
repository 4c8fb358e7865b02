"""The spec of a served model: schema, loading, locks, digests, receipts and errors.

What it is: the vocabulary every other package shares. It imports nothing of the project and nothing heavy.
What it refuses to be: a place for work. No network, no tensors, no Prefect.
Run it: `kilotok schema` prints the schema, `kilotok plan SPEC` loads a spec.
"""
