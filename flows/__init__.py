"""The order of the stages, their retries and concurrency; the command line and the schedules. No torch, no
file formats."""
