"""Command line of the audit, `python -m handpose.sweep.audit FOLDER`; see `audit.main`."""

from handpose.sweep.audit.audit import main

main()
