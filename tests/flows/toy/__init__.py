"""A repository whose stages are toys and whose nights are run by the real flow."""
