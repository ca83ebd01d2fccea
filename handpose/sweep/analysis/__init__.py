"""Reads the files of a sweep: records for reports, the importance of parameters, and the sweep's status."""
