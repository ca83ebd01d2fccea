"""Show sweeps while they run, on a page of this machine.

python -m handpose.dashboard outputs/sweeps/NAME
"""

import secrets
import socket
from collections.abc import Sequence

import uvicorn

from handpose.dashboard.live_sweep import LiveSweep
from handpose.dashboard.server import make_app
from handpose.errors import UserError
from handpose.program import exit_on_user_error, make_parser
from handpose.sweep.record.interventions import find_sweep_folder
from handpose.utf8 import use_utf8

_DESCRIPTION = """\
Show sweeps on a page that updates itself: progress, trials, learning curves, and buttons that stop, retry or
keep a trial and pause or resume the sweep. The page is served on this machine only; its address has a token.

  python -m handpose.dashboard outputs/sweeps/NAME
  python -m handpose.dashboard outputs/sweeps/* --port 8000 --read-only

From another machine: ssh -L 8000:127.0.0.1:8000 HOST
"""
_HOST = "127.0.0.1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line until it is interrupted, and return its exit status.

    Raises:
        SystemExit: with status 2, if an argument is wrong.
    """
    parser = make_parser("handpose.dashboard", _DESCRIPTION)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder of a sweep")
    parser.add_argument("--port", type=int, default=0, help="port of the page; default: any free one")
    parser.add_argument("--read-only", action="store_true", help="without buttons")
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        sweeps = [LiveSweep(find_sweep_folder(place)) for place in options.folders]
        with _listen(options.port) as listener:
            port, token = listener.getsockname()[1], secrets.token_urlsafe(24)
            hosts = [f"{name}:{port}" for name in (_HOST, "localhost")]
            app = make_app(sweeps, token=token, hosts=hosts, read_only=options.read_only)
            print(f"open http://{_HOST}:{port}/#{token}  (Ctrl-C ends the page, not the sweep)", flush=True)
            config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", server_header=False)
            uvicorn.Server(config).run(sockets=[listener])
    return 0


def _listen(port: int) -> socket.socket:
    """Return a socket on this machine's own address.

    Raises:
        UserError: the port is taken or not allowed.
    """
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_HOST, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"--port {port} cannot be used ({error}); give another one, or none") from error
    return listener


if __name__ == "__main__":
    use_utf8()
    raise SystemExit(main())
