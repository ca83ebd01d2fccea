"""What is tried: search spaces, the points to try first, and searchers, which propose configurations.

What searchers learn from is kept in an Optuna study (`study`); `sampler_view` is what a sampler sees of it.
"""
