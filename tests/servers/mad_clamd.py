"""A program that passes for clamd until a file says what to do: die, hang or talk nonsense."""

import os
import re
import socket
import sys
import threading
import time


def serve(connection: socket.socket) -> None:
    """Answer one client."""
    number = 0
    while command := connection.recv(11, socket.MSG_PEEK):
        if command.startswith(b"zVERSION"):
            connection.recv(9)
            connection.sendall(b"ClamAV 9.9.9\0")
            return
        if command.startswith(b"zIDSESSION"):
            connection.recv(11)
            continue
        connection.recv(8)
        number += 1
        _, fds, _, _ = socket.recv_fds(connection, 1, 1)
        body = os.pread(fds[0], 1000, 0)
        os.close(fds[0])
        if b"die" in body:
            os._exit(13)
        if b"hang" in body:
            time.sleep(1000)
        if b"slow" in body:
            time.sleep(0.4)
        if b"babble" in body:
            connection.sendall(b"OK OK OK\0")
            continue
        connection.sendall(b"%d: fd[7]: OK\0" % number)


def main() -> None:
    """Read the configuration that clamd would read, and serve."""
    with open(sys.argv[2]) as file:
        path = re.search(r"^LocalSocket (.*)$", file.read(), re.MULTILINE)[1]
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(50)
        while True:
            connection, _ = server.accept()
            threading.Thread(target=serve, args=[connection], daemon=True).start()


if __name__ == "__main__":
    main()
