"""Signatures that freshclam keeps: what it fetches is judged by, without a restart."""

import json
import subprocess
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

from running import Home
from servers import need


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def fetch(folder, url):
    config = folder / "freshclam.conf"
    config.write_text(
        f"DatabaseDirectory {folder / 'signatures'}\nDatabaseOwner root\nDNSDatabaseInfo no\n"
        "DatabaseMirror http://127.0.0.1:1\nScriptedUpdates no\nMaxAttempts 1\nConnectTimeout 5\n"
        f"DatabaseCustomURL {url}/ours.ndb\n"
        "ExcludeDatabase main\nExcludeDatabase daily\nExcludeDatabase bytecode\n"
    )
    done = subprocess.run(
        ["freshclam", f"--config-file={config}", "--stdout"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (folder / "signatures" / "ours.ndb").exists(), done.stdout


def write(path, *words):
    path.write_text("".join(f"Ours.{w}:0:*:{w.encode().hex()}\n" for w in words))


def test_what_freshclam_fetches_is_judged_by_at_once(tmp_path):
    need("clamd")
    need("freshclam")
    www = tmp_path / "www"
    www.mkdir()
    (tmp_path / "signatures").mkdir()
    write(www / "ours.ndb", "firstword")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(www)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    home = Home(tmp_path, '[signatures]\ndirectory = "signatures"\n')
    drop = home.data / "drop"
    try:
        fetch(tmp_path, url)
        with home.running("up") as up:
            up.wait_for("ready")
            assert "DEMONSTRATION" not in up.log
            (drop / "one").write_text("a firstword")
            (drop / "two").write_text("a secondword")
            up.wait_for("Ours.firstword")
            up.wait_for('"key": "two"')
            time.sleep(1.1)  # freshclam compares dates by the second
            write(www / "ours.ndb", "firstword", "secondword")
            fetch(tmp_path, url)
            up.wait_for("2 signatures", 60)
            (drop / "three").write_text("another secondword")
            up.wait_for("Ours.secondword")
    finally:
        server.shutdown()
        server.server_close()

    found = [json.loads(line) for line in home.run("finding", "list").stdout.splitlines()]
    judged = {one["object"]["key"]: one["reports"][0]["signatures"] for one in found}
    assert set(judged) == {"one", "three"}
    assert judged["one"]["count"] == 1
    assert judged["three"]["count"] == 2
    assert judged["one"]["digest"] != judged["three"]["digest"]
    assert not judged["one"]["is_demo"]
