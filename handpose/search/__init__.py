"""Search spaces, the points to try first, and searchers, which propose configurations.

The searcher keeps the results in an Optuna study (`study`). `sampler_view` is the view of it that a sampler gets.
"""
