"""The server of the downloader's tests does what its catalogue says: shown with plain sockets."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from pipeline.core.errors import FAILURES
from tests import image_server
from tests.download_faults import FAULTS, png_bomb
from tests.image_server import ImageServer
from tests.pool_fixture import drawing

IMAGES = [drawing(number, kind=kind) for number in range(20) for kind in ("JPEG", "PNG")]


@pytest.fixture(scope="module")
def server():
    with ImageServer(IMAGES) as running:
        yield running


def raw(server: ImageServer, path: str, limit_bytes: int = 1 << 20, limit_s: float = 30) -> tuple[bytes, str]:
    """What came, and how it ended: closed, reset, stalled or cut (at the limit)."""
    port = server.ports["faults"]
    received = b""
    with socket.create_connection(("127.0.0.2", port), limit_s) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        deadline_s = time.monotonic() + limit_s
        while len(received) < limit_bytes:
            client.settimeout(max(deadline_s - time.monotonic(), 0.001))
            try:
                data = client.recv(65536)
            except TimeoutError:
                return received, "stalled"
            except ConnectionResetError:
                return received, "reset"
            if not data:
                return received, "closed"
            received += data
    return received, "cut"


def test_every_image_comes_as_it_is_from_all_processes_and_is_counted(server):
    for number, image in enumerate(IMAGES):
        with urllib.request.urlopen(server.url(f"/img/{number}.jpg", server.hosts[number % 7])) as response:
            assert response.read() == image
            assert response.headers["Content-Type"] == ("image/jpeg", "image/png")[number % 2]
    assert all(server.requests()[f"/img/{number}.jpg"] == 1 for number in range(len(IMAGES)))
    assert len(server.processes) == 2


@pytest.mark.parametrize(
    ("name", "begins", "holds", "ends"),
    [
        ("status_404", b"HTTP/1.1 404 ", b"gone", "closed"),
        ("rate_limit_always", b"HTTP/1.1 429 ", b"\r\nRetry-After: 3600\r\n", "closed"),
        ("stall_before_headers", b"", b"", "stalled"),
        ("stall_in_body", b"HTTP/1.1 200 OK", b"image/", "stalled"),
        ("trickle_body", b"HTTP/1.1 200 OK", b"image/", "stalled"),
        ("empty_reply", b"", b"", "closed"),
        ("reset_in_body", b"HTTP/1.1 200 OK", b"Content-Length", "reset"),
        ("http_0_9", b"", b"", "closed"),
        ("huge_undeclared_body", b"HTTP/1.1 200 OK", bytes(60_000), "cut"),
        ("header_flood", b"HTTP/1.1 200 OK\r\nX-Flood", b"X-Flood: 0123456789\r\n", "cut"),
        ("redirect_to_loopback", b"HTTP/1.1 302 ", b"Location: http://127.0.0.1:", "closed"),
        ("robots_after_colon", b"HTTP/1.1 200 OK", b"X-Robots-Tag: max-image-preview: large, noai", "closed"),
    ],
)
def test_faults_are_what_they_say(server, name, begins, holds, ends):
    received, ended = raw(server, f"/fault/{name}.jpg", limit_s=2 if ends == "stalled" else 30)
    assert received.startswith(begins) and holds in received and ended == ends


def test_a_truncated_body_is_half_of_what_it_declared(server):
    head, body = raw(server, "/fault/truncated_body.jpg")[0].split(b"\r\n\r\n", 1)
    assert f"Content-Length: {2 * len(body)}".encode() in head and body in IMAGES


def test_a_fault_heals_after_two_requests(server):
    answers = [raw(server, "/fault/heals_502.jpg")[0][9:12] for _ in range(4)]
    assert answers == [b"502", b"502", b"200", b"200"]


def test_requests_at_a_forbidden_address_are_leaks_and_others_are_not(server):
    raw(server, "/fault/status_404.jpg")
    before = server.leaks()
    urllib.request.urlopen(f"http://127.0.0.1:{server.ports['secret']}/me.jpg").close()
    assert before == {}
    assert server.leaks() == {"127.0.0.1": 1, "127.0.0.1 /me.jpg": 1}


def test_the_bombs_are_small_and_their_headers_tell_the_size():
    from PIL import Image

    small = png_bomb(2_000)
    with Image.open(io.BytesIO(small)) as image:
        image.load()
        assert image.size == (2_000, 2_000) and not image.getbbox()
    assert len(png_bomb()) < 2 << 20


def test_every_fault_names_a_failure_class_that_exists(server):
    wrong = {name: fault.expected for name, fault in FAULTS.items() if not set(fault.expected) <= {*FAILURES, "ok"}}
    assert not wrong
    assert len({server.fault_url(fault) for fault in server.faults()}) == len(server.faults())


def test_what_belongs_in_isolation_refuses_to_run_in_the_machines_own_network():
    own = ",".join(image_server.namespaces())
    done = subprocess.run(
        [sys.executable, image_server.__file__, "inside", own, "true"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "not in fresh namespaces" in done.stderr


def test_in_isolation_names_resolve_as_told_and_private_addresses_count_as_leaks(tmp_path):
    if not image_server.can_isolate():
        pytest.skip("this machine lets nobody make namespaces")
    script = tmp_path / "inside.py"
    script.write_text(
        "import json, socket, sys, urllib.request\n"
        f"sys.path.insert(0, {str(image_server.ROOT)!r})\n"
        "from tests.image_server import ImageServer\n"
        "find = lambda name: socket.gethostbyname(name)\n"
        f"with ImageServer([{IMAGES[0]!r}]) as server:\n"
        "    names = [find('good.test'), find('rebind.test'), find('rebind.test'), find('private.test')]\n"
        "    urllib.request.urlopen('http://169.254.169.254/latest/x.jpg').close()\n"
        "    good = urllib.request.urlopen(f'https://good.test:{server.ports[\"tls_good\"]}/img/0.jpg').status\n"
        "    interfaces = [name for _, name in socket.if_nameindex()]\n"
        "    print(json.dumps([names, interfaces, good, server.leaks()]))\n"
    )
    done = image_server.in_isolation([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        ["203.0.114.10", "203.0.114.20", "127.0.0.1", "10.0.0.1"],
        ["lo"],
        200,
        {"169.254.169.254": 1, "169.254.169.254 /latest/x.jpg": 1},
    ]
