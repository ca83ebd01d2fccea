"""Audits whether all files of a sweep agree with each other: `python -m handpose.sweep.audit FOLDER`."""
