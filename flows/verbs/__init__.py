"""The verbs of `kilotok`, one module per theme; `flows/cli.py` joins them.

A module offers `register(add)`, which names its verbs, and one function per verb: a few lines over `tasks`, with its
imports inside, so that `kilotok plan` answers at once.
"""
