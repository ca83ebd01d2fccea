"""A page that shows sweeps while they run, with buttons to steer them: `python -m handpose.dashboard DIR`."""
