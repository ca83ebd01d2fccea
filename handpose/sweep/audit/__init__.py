"""Whether all files of a sweep agree: `python -m handpose.sweep.audit FOLDER`."""
