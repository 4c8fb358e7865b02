"""Every night, unattended: what moved, what was measured, what got worse and why. Pure functions over the store.

Refuses to know Prefect (`flows/nightly.py` does) and to change an input on its own: drift is reported, never taken.
Look at it with `kilotok history SPEC`.
"""
