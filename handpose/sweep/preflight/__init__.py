"""What is checked and tried out before a sweep, so that mistakes cost no slot, and the forecast of its cost."""
