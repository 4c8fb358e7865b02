"""The stages of the pipeline, their store and their edges. Pure of Prefect: `flows/` orchestrates them."""
