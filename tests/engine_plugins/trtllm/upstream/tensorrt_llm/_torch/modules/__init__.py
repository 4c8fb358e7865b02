"""As upstream: modules that the models are made of."""
