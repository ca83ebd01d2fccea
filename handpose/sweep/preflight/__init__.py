"""Checks and short trial runs before a sweep, so that mistakes use no slot; also forecasts the sweep's cost."""
