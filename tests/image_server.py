"""A real HTTP server for the downloader's tests and benchmarks: several processes, real images, every fault.

    with ImageServer(real_images(folder, 2000)) as server:
        server.url("/img/17.jpg")            # image 17, kept alive, from any of the processes
        server.url("/fault/truncated_body.jpg")   # a fault of download_faults.FAULTS, from the first process
        server.requests(), server.leaks()    # who was asked for what, and what reached a forbidden address

On loopback it listens at 127.0.0.2 to 127.0.0.8, which a test allows, and as the secret server at 127.0.0.1 and ::1,
which it does not. What tempts towards other addresses runs under `in_isolation`: a network namespace with loopback
alone, in which every address below is this machine's own, so that a leak is answered and counted, and nothing leaves.

    python tests/image_server.py isolated COMMAND ...
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import datetime
import functools
import io
import ipaddress
import json
import mmap
import os
import pathlib
import random
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from tests.download_faults import FAULTS, Fault  # noqa: E402

LOOPBACK_HOSTS = [f"127.0.0.{number}" for number in range(2, 9)]
LOOPBACK_SECRETS = ["127.0.0.1", "::1"]
# In isolation: public addresses, which nobody outside is asked for, and those that no downloader may touch.
PUBLIC_HOSTS = [f"203.0.114.{number}" for number in range(1, 251)]
PUBLIC_NETWORK = "203.0.114.254/24"
PRIVATE_ADDRESSES = [
    *["169.254.169.254", "169.254.170.2", "100.100.100.200", "10.0.0.1", "172.16.0.1", "192.168.0.1"],
    *["fd00::1", "fd00:ec2::254", "64:ff9b::7f00:1", "2002:7f00:1::1"],
]
ISOLATED = "WINNOW_TEST_ISOLATED"  # in the environment of what runs in isolation: the folder of its certificates
CERTIFICATES = ("good", "self_signed", "expired", "wrong_host")
MAX_S, MAX_SENT_BYTES = 20, 50 << 20  # where the server itself ends what has no end
TYPES = {b"\xff\xd8": "image/jpeg", b"\x89P": "image/png", b"GI": "image/gif", b"RI": "image/webp"}
REASONS = {200: "OK", 206: "Partial Content", 302: "Found", 404: "Not Found", 429: "Too Many Requests"}


class ServerEndsError(Exception):
    """The server has sent or waited for as much as it is willing to."""


class Images:
    """Images in one packed file that all processes map; offsets beside it."""

    def __init__(self, path: str, ends: Sequence[int]):
        with open(path, "rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.ends = ends

    def __getitem__(self, number: int) -> bytes:
        number %= len(self.ends)
        return self.data[self.ends[number - 1] if number else 0 : self.ends[number]]


class Request:
    """One request and the means to answer it: what `serve` of a fault is given."""

    def __init__(self, connection: Connection, path: str, nth: int):
        self.connection = connection
        self.transport = connection.transport
        self.path, _, query = path.partition("?")
        self.query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        self.nth = nth  # 1 for the first request for this path
        self.name = self.path.rsplit("/", 1)[-1].removesuffix(".jpg")
        self.image_bytes = connection.server.images[list(FAULTS).index(self.name) if self.name in FAULTS else 0]
        self.content_type = TYPES.get(self.image_bytes[:2], "application/octet-stream")
        self.keep_alive = False
        self.sent_bytes = 0
        self.started_s = time.monotonic()

    def expand(self, template: str) -> str:
        """The template with this server's ports in place."""
        return template.format(name=self.name, **self.connection.server.names, host=self.connection.host)

    def head(self, status: int, length: int | None, content_type: str | None = None, **headers: str) -> bytes:
        """The status line and the headers; without a length, the end of the body is the end of the connection."""
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Whatever')}"]
        lines.append(f"Content-Type: {content_type or self.content_type}")
        if length is not None:
            lines.append(f"Content-Length: {length}")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode()

    def reply(self, status: int, body: bytes = b"", content_type: str | None = "image/jpeg", **headers: str) -> None:
        """A whole response; the connection stays open."""
        head = self.head(status, len(body), content_type, **headers)
        if content_type is None:
            head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.startswith(b"Content-Type"))
        self.transport.write(head + body)
        self.keep_alive = headers.get("Connection") != "close"

    def image(self) -> None:
        self.reply(200, self.image_bytes, self.content_type)

    async def send(self, data: bytes) -> None:
        """Returns once the other side has taken most of it. Raises ServerEndsError."""
        self.sent_bytes += len(data)
        if self.transport.is_closing() or self.sent_bytes > MAX_SENT_BYTES:
            raise ServerEndsError
        self.transport.write(data)
        self.connection.server.sent_bytes[self.name] += len(data)
        await self.sleep(0)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.connection.writable.wait(), MAX_S)

    async def sleep(self, seconds: float) -> None:
        if time.monotonic() + seconds > self.started_s + MAX_S or self.transport.is_closing():
            raise ServerEndsError
        await asyncio.sleep(seconds)

    async def stall(self) -> None:
        while True:
            await self.sleep(0.2)

    def reset(self) -> None:
        """Closes the connection with RST."""
        linger = struct.pack("ii", 1, 0)
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.transport.abort()


class Connection(asyncio.Protocol):
    """One connection: images at once, faults as a task."""

    def __init__(self, server: Server):
        self.server = server
        self.buffer = b""
        self.task: asyncio.Task | None = None
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.host = transport.get_extra_info("sockname")[0]
        self.forbidden = self.host not in self.server.hosts
        self.server.connections[self.host] += 1
        if self.forbidden:
            self.server.leaks[self.host] += 1

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.writable.set()
        if self.task:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.buffer and not self.buffer[:1].isalpha():  # a TLS client, say
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()
            return
        while not self.task and (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head, self.buffer = self.buffer[:end], self.buffer[end + 4 :]
            path = head.split(b" ", 2)[1].decode("utf-8", "replace") if head.count(b" ") else "/"
            self.answer(path, head)

    def answer(self, path: str, head: bytes) -> None:
        server = self.server
        server.requests[path] += 1
        if self.forbidden:
            server.leaks[f"{self.host} {path}"] += 1
        if self.forbidden or path.startswith("/img/"):
            number = path[5:].partition(".")[0]
            body = server.images[int(number) if number.isdecimal() else 0]
            content_type = TYPES.get(body[:2], "application/octet-stream")
            start = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
            self.transport.write(start.encode() + body)
        elif path.startswith("/fault/"):
            server.heads[path] = head.decode("latin-1")
            self.task = asyncio.get_running_loop().create_task(self.serve_fault(path))
            return
        elif path == "/robots.txt":
            body = b"User-agent: *\nDisallow: /fault/robots_txt_disallows\n"
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        else:
            status = b"414 URI Too Long" if len(path) > 16_000 else b"404 Not Found"
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
        if b"connection: close" in head.lower() or b" HTTP/1.0" in head:
            self.transport.close()

    async def serve_fault(self, path: str) -> None:
        request = Request(self, path, self.server.requests[path])
        serve = FAULTS[request.name].serve if request.name in FAULTS else None
        try:
            await (serve(request) if serve else asyncio.sleep(0, request.reply(404)))
        except ServerEndsError:
            request.keep_alive = False
        self.task = None
        if not request.keep_alive or "connection: close" in self.server.heads[path].lower():
            self.transport.close()
        else:
            self.data_received(b"")


class Server:
    """One process of the server: its listening sockets come from the parent, its counts go there."""

    def __init__(self, config: dict[str, Any]):
        self.images = Images(config["images"], config["ends"])
        self.hosts = set(config["hosts"])
        self.names = config["names"]
        self.requests: collections.Counter[str] = collections.Counter()
        self.connections: collections.Counter[str] = collections.Counter()
        self.leaks: collections.Counter[str] = collections.Counter()
        self.sent_bytes: collections.Counter[str] = collections.Counter()
        self.heads: dict[str, str] = {}
        self.config = config

    async def run(self) -> None:
        """Returns when the parent has closed this process's standard input."""
        loop = asyncio.get_running_loop()
        for certificate, descriptors in self.config["sockets"]:
            context = None
            if certificate:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(pathlib.Path(self.config["certificates"], f"{certificate}.pem"))
            for descriptor in descriptors:
                listening = socket.socket(fileno=descriptor)
                # A short backlog here makes each process accept a few at a time: they share the queue.
                await loop.create_server(lambda: Connection(self), sock=listening, ssl=context, backlog=8)
                listening.listen(4096)
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        print("ready", flush=True)
        while await reader.readline():
            counts = {name: getattr(self, name) for name in ("requests", "connections", "leaks", "sent_bytes", "heads")}
            print(json.dumps(counts), flush=True)


class ImageServer:
    """The server as a test sees it: a context manager.

    Args:
        images: the files' bytes, JPEG, PNG, GIF or WebP.
        processes: how many serve /img; the first one serves the faults too, so that "the third request" has a meaning.
        cores: where the processes may run (os.sched_setaffinity); all by default.
    """

    def __init__(self, images: Sequence[bytes], processes: int = 2, cores: set[int] | None = None):
        self.images, self.num_processes, self.cores = images, processes, cores
        self.isolated = ISOLATED in os.environ
        self.hosts = PUBLIC_HOSTS if self.isolated else LOOPBACK_HOSTS

    def __enter__(self) -> ImageServer:
        with contextlib.ExitStack() as stack:
            self.folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="winnow-image-server-"))
            certificates = os.environ.get(ISOLATED) or self.folder
            if not self.isolated:
                write_certificates(certificates, LOOPBACK_HOSTS)
            ends, at = [], 0
            with open(os.path.join(self.folder, "images"), "wb") as file:
                for data in self.images:
                    file.write(data)
                    ends.append(at := at + len(data))
            addresses = ["0.0.0.0", "::"] if self.isolated else LOOPBACK_HOSTS
            secrets = addresses if self.isolated else LOOPBACK_SECRETS
            wanted = dict.fromkeys(("images", "faults", *(f"tls_{name}" for name in CERTIFICATES)), addresses)
            sockets = {name: listening(addresses) for name, addresses in (wanted | {"secret": secrets}).items()}
            if self.isolated:
                sockets["secret_80"] = listening(addresses, 80)
            closed = listening(addresses[:1], listen=False)  # held so that nobody else opens it
            for held in [*sockets.values(), closed]:
                for each in held:
                    stack.callback(each.close)
            self.ports = {name: held[0].getsockname()[1] for name, held in sockets.items()}
            tls = {name: self.ports[name] for name in wanted if name.startswith("tls_")}
            self.names = {"port": self.ports["faults"], "secret": self.ports["secret"], **tls}
            self.names |= {"secret_wrapped": self.ports["secret"] + 65536, "closed": closed[0].getsockname()[1]}
            self.names["image"] = self.url("/img/2.jpg")
            self.processes = []
            for number in range(self.num_processes):
                mine = sockets if number == 0 else {"images": sockets["images"]}
                config = {
                    "images": os.path.join(self.folder, "images"),
                    "ends": ends,
                    "hosts": [*self.hosts, *(["2606:4700:4700::1111"] if self.isolated else [])],
                    "names": self.names,
                    "certificates": certificates,
                    "sockets": [
                        (
                            name.removeprefix("tls_") if name.startswith("tls_") else None,
                            [each.fileno() for each in held],
                        )
                        for name, held in mine.items()
                    ],
                }
                config_path = os.path.join(self.folder, f"{number}.json")
                pathlib.Path(config_path).write_text(json.dumps(config))
                process = subprocess.Popen(
                    [sys.executable, __file__, "serve", config_path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    pass_fds=[each.fileno() for held in mine.values() for each in held],
                    text=True,
                )
                stack.callback(end_process, process)
                self.processes.append(process)
                if self.cores:
                    os.sched_setaffinity(process.pid, self.cores)
            for process in self.processes:
                if process.stdout.readline() != "ready\n":
                    raise RuntimeError("a process of the image server did not start")
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def url(self, path: str, host: str | None = None) -> str:
        """The URL of /img/N.jpg or /fault/NAME.jpg at one of the server's hosts."""
        port = self.ports["faults" if path.startswith("/fault/") else "images"]
        return f"http://{host or self.hosts[0]}:{port}{path}"

    def fault_url(self, fault: Fault) -> str | None:
        """The URL of a fault, at a host of its own as far as there are hosts."""
        host = self.hosts[list(FAULTS).index(fault.name) % len(self.hosts)]
        return fault.url and fault.url.format(name=fault.name, host=host, **self.names)

    def faults(self) -> list[Fault]:
        """The catalogue, as far as it may be tried here."""
        return [fault for fault in FAULTS.values() if self.isolated or not fault.isolated]

    def _counts(self, what: str) -> dict[str, int]:
        total: collections.Counter[str] = collections.Counter()
        for process in self.processes:
            process.stdin.write("\n")
            process.stdin.flush()
            total.update(json.loads(process.stdout.readline())[what])
        return dict(total)

    def requests(self) -> dict[str, int]:
        """{path with its query: requests seen}, of all processes."""
        return self._counts("requests")

    def connections(self) -> dict[str, int]:
        """{address at this end: connections accepted}."""
        return self._counts("connections")

    def leaks(self) -> dict[str, int]:
        """{"ADDRESS" or "ADDRESS PATH": connections or requests} at addresses that no downloader may touch."""
        return self._counts("leaks")

    def sent_bytes(self) -> dict[str, int]:
        """{fault: bytes} of faults that are sent piece by piece."""
        return self._counts("sent_bytes")

    def request_head(self, fault: str) -> str:
        """The last request for a fault as it came: request line and headers."""
        self.processes[0].stdin.write("\n")
        self.processes[0].stdin.flush()
        heads = json.loads(self.processes[0].stdout.readline())["heads"]
        return heads[f"/fault/{fault}.jpg"]


def end_process(process: subprocess.Popen) -> None:
    """Returns once it has ended: it does when its standard input is closed."""
    process.stdin.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def listening(addresses: Sequence[str], port: int = 0, listen: bool = True) -> list[socket.socket]:
    """Sockets at one port of all these addresses."""
    for _ in range(100):
        made, chosen = [], port
        try:
            for address in addresses:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                made.append(socket.socket(family, socket.SOCK_STREAM))
                made[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    made[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                made[-1].bind((address, chosen))
                chosen = made[-1].getsockname()[1]
                if listen:
                    made[-1].listen(4096)
            return made
        except OSError:
            for each in made:
                each.close()
    raise RuntimeError(f"no port is free at all of {', '.join(addresses)}")


def write_certificates(folder: str, hosts: Sequence[str]) -> None:
    """Nothing; writes authority.pem and NAME.pem (certificate and key) for each of CERTIFICATES."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.timezone.utc)

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def certificate(subject: str, key: Any, issuer: str, issuer_key: Any, days: int, hosts: Sequence[str]) -> bytes:
        alternatives = [x509.DNSName(host) for host in hosts if host[-1].isalpha()]
        alternatives += [x509.IPAddress(ipaddress.ip_address(host)) for host in hosts if not host[-1].isalpha()]
        made = x509.CertificateBuilder(name(issuer), name(subject), key.public_key(), x509.random_serial_number())
        made = made.not_valid_before(now - datetime.timedelta(9)).not_valid_after(now + datetime.timedelta(days))
        made = made.add_extension(x509.BasicConstraints(ca=not hosts, path_length=None), critical=True)
        if alternatives:
            made = made.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return made.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    authority = ec.generate_private_key(ec.SECP256R1())
    path = pathlib.Path(folder)
    path.joinpath("authority.pem").write_bytes(certificate("Test CA", authority, "Test CA", authority, 9, []))
    here = [*hosts, "good.test", "*.good.test"]
    for kind in CERTIFICATES:
        key = ec.generate_private_key(ec.SECP256R1())
        issuer, issuer_key = (kind, key) if kind == "self_signed" else ("Test CA", authority)
        names = ["other.example"] if kind == "wrong_host" else here
        pem = certificate(kind, key, issuer, issuer_key, -1 if kind == "expired" else 9, names)
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        pem += key.private_bytes(encoding, form, serialization.NoEncryption())
        path.joinpath(f"{kind}.pem").write_bytes(pem)


# Isolation


@functools.cache
def can_isolate() -> bool:
    """Whether this machine lets us make namespaces."""
    command = [*unshare(), "ip", "link", "set", "lo", "up"]
    try:
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def unshare() -> list[str]:
    """The command that runs another one in namespaces of its own; all its processes end with it."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *user, "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def in_isolation(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
    """The finished command, run where loopback is the only network; `options` as of subprocess.run."""
    outside = ",".join(namespaces())
    return subprocess.run([*unshare(), sys.executable, __file__, "inside", outside, *argv], **options)


def namespaces() -> list[str]:
    """The names of this process's network and mount namespaces."""
    return [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "mnt")]


def refuse_outside(outside: str) -> None:
    """Nothing; raises unless both namespaces are others than the caller's, and the network leads nowhere.

    What follows mounts over /etc and takes addresses: in the machine's own namespaces it would break the machine.
    """
    shared = set(outside.split(",")) & set(namespaces())
    routes = pathlib.Path("/proc/net/route").read_text().splitlines()[1:]
    if len(outside.split(",")) != 2 or shared or routes:
        raise RuntimeError("not in fresh namespaces: use `image_server.py isolated COMMAND` or in_isolation")


def run_inside(outside: str, argv: Sequence[str]) -> int:
    """The exit code of a command, run in this process's fresh namespaces with addresses, names and an authority."""
    refuse_outside(outside)
    import certifi

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def bind(text: str, target: str) -> None:
        path = os.path.join(folder, f"bound{len(os.listdir(folder))}")
        pathlib.Path(path).write_text(text)
        subprocess.run(["mount", "--bind", path, os.path.realpath(target)], check=True)

    ip("link", "set", "lo", "up")
    ip("addr", "add", PUBLIC_NETWORK, "dev", "lo")
    for address in [*PRIVATE_ADDRESSES, "2606:4700:4700::1111"]:
        version, length = ("-6", 128) if ":" in address else ("-4", 32)
        ip(version, "addr", "add", f"{address}/{length}", "dev", "lo")
    folder = tempfile.mkdtemp(prefix="winnow-isolated-")
    try:
        write_certificates(folder, PUBLIC_HOSTS)
        # Both certifi's users and those of OpenSSL's own settings trust our authority, in this namespace alone.
        bundle = pathlib.Path(certifi.where()).read_text() + pathlib.Path(folder, "authority.pem").read_text()
        bind(bundle, certifi.where())
        bind("nameserver 127.0.0.1\noptions timeout:3 attempts:2\n", "/etc/resolv.conf")
        bind("hosts: files dns\n", "/etc/nsswitch.conf")
        bind("127.0.0.1 localhost\n::1 localhost\n", "/etc/hosts")
        threading.Thread(target=serve_names, daemon=True).start()
        env = {**os.environ, ISOLATED: folder, "SSL_CERT_FILE": certifi.where()}
        return subprocess.run(argv, env=env).returncode
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def addresses_of(name: str, nth: int) -> list[str] | None:
    """The addresses of a name under .test at the n-th question for it (from 1); None: there is no such name."""
    labels = name.split(".")
    if labels[-2:] == ["good", "test"]:
        return [f"203.0.114.{labels[0]}" if labels[0].isdecimal() else "203.0.114.10"]
    if labels[0].startswith("rebind"):
        return ["203.0.114.20" if nth == 1 else "127.0.0.1"]
    return {
        "localhost": ["127.0.0.1"],
        "private.test": ["10.0.0.1"],
        "metadata.test": ["169.254.169.254"],
        "alias.test": ["10.0.0.1"],
        "loopback6.test": ["::1"],
        "mapped.test": ["::ffff:127.0.0.1"],
        "nat64.test": ["64:ff9b::7f00:1"],
        "mixed.test": ["203.0.114.30", "10.0.0.1"],
        "nodata.test": [],
    }.get(name)


def serve_names() -> None:
    """Never returns: a name server at 127.0.0.1, UDP, of what the catalogue's names are."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 53))
    asked: collections.Counter[tuple[str, int]] = collections.Counter()
    while True:
        question, client = server.recvfrom(4096)
        labels, at = [], 12
        while question[at]:
            labels.append(question[at + 1 : at + 1 + question[at]].decode("latin-1").lower())
            at += 1 + question[at]
        name, kind = ".".join(labels), int.from_bytes(question[at + 1 : at + 3], "big")
        asked[name, kind] += 1
        found = addresses_of(name, asked[name, kind])
        if name == "slowdns.test":
            continue
        code = 2 if name == "servfail.test" else 3 if found is None else 0
        answers = b""
        if name == "alias.test":
            answers += b"\xc0\x0c" + struct.pack(">HHIH", 5, 1, 0, 14) + b"\x07private\x04test\0"
        for address in map(ipaddress.ip_address, found or []):
            if kind == (1 if address.version == 4 else 28):
                owner = b"\x07private\x04test\0" if name == "alias.test" else b"\xc0\x0c"
                answers += owner + struct.pack(">HHIH", kind, 1, 0, len(address.packed)) + address.packed
        num_answers = len([1 for address in found or [] if (":" in address) == (kind == 28)]) + (name == "alias.test")
        head = question[:2] + struct.pack(">HHHHH", 0x8580 | code, 1, num_answers, 0, 0)
        server.sendto(head + question[12 : at + 5] + answers, client)


# Images


def real_images(real_data_path: str | os.PathLike, number: int) -> list[bytes]:
    """Distinct images out of the real pools, as they are stored there."""
    import pyarrow.parquet as pq

    found: dict[str, bytes] = {}
    for path in sorted(pathlib.Path(real_data_path).glob("captions_pool/*/train/*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(256, columns=["sha256", "image"]):
            found |= zip(batch["sha256"].to_pylist(), batch["image"].to_pylist(), strict=True)
            if len(found) >= number:
                return list(found.values())[:number]
    raise ValueError(f"{len(found)} distinct images in {real_data_path}, expected {number}")


def web_photos(real_data_path: str | os.PathLike) -> Iterator[bytes]:
    """The JPEG bytes of 32 photos of the web, 413 to 840 px."""
    import tarfile

    with tarfile.open(pathlib.Path(real_data_path, "web_metadata", "cc12m_sample_32.tar")) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                yield tar.extractfile(member).read()


def sized_images(real_data_path: str | os.PathLike, number: int, side_px: int) -> list[bytes]:
    """Distinct JPEGs (quality 88) of the 32 photos, each cut a little differently, with a longer side of `side_px`."""
    from PIL import Image

    photos = [Image.open(io.BytesIO(data)).convert("RGB") for data in web_photos(real_data_path)]
    random_cut = random.Random(0)
    made: dict[bytes, None] = {}
    while len(made) < number:
        photo = photos[len(made) % len(photos)]
        left, top, right, bottom = (random_cut.randrange(20) for _ in range(4))
        box = (left, top, photo.width - right, photo.height - bottom)
        scale = side_px / max(box[2] - box[0], box[3] - box[1])
        size_px = (round((box[2] - box[0]) * scale), round((box[3] - box[1]) * scale))
        out = io.BytesIO()
        photo.resize(size_px, Image.Resampling.BICUBIC, box=box).save(out, "JPEG", quality=88)
        made[out.getvalue()] = None
    return list(made)


if __name__ == "__main__":
    if sys.argv[1] == "isolated":
        sys.exit(in_isolation(sys.argv[2:]).returncode)
    if sys.argv[1] == "inside":
        sys.exit(run_inside(sys.argv[2], sys.argv[3:]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    asyncio.run(Server(json.loads(pathlib.Path(sys.argv[2]).read_text())).run())
