"""What the S3 drill is made of: a door to the store that can be shut, and a sentence where there is no store."""

import socket
import sys

import pytest

from benchmarks.s3_drill import TcpProxy, main


def test_a_door_is_shut_for_a_while_and_leads_to_the_same_place_afterwards():
    with socket.create_server(("127.0.0.1", 0)) as server:
        door = TcpProxy(server.getsockname()[1])

        def passes():
            try:
                with socket.create_connection(("127.0.0.1", door.port), timeout=5.0) as near:
                    near.sendall(b"hello")
                    far, _ = server.accept()
                    with far:
                        return far.recv(5) == b"hello"
            except ConnectionRefusedError:
                return False

        assert passes()
        with door.interrupt():
            assert not passes()
        assert passes()
        door.close()


def test_without_moto_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["s3_drill.py", "--moto", "false"])
    with pytest.raises(SystemExit, match=r'pip install "moto\[server\]"'):
        main()
