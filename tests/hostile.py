"""Files made to fool or to hurt a scanner; every one is small, and made anew in memory.

`hostile_files(payload)` names them all with what may be said of each.
"""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

PASSWORD = "correct horse"


def zipped(members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip archive of `members`."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, body in members.items():
            archive.writestr(zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), body, method)
    return out.getvalue()


def nested(payload: bytes, levels: int) -> bytes:
    """Return `payload` inside `levels` zip archives."""
    for level in range(levels):
        payload = zipped({f"{level}.zip" if level else "innermost": payload})
    return payload


def zip_bomb(copies: int = 30, unpacked: int = 20 << 20) -> bytes:
    """Return some kilobytes that unpack to `copies` times `unpacked` zero bytes, in two steps."""
    inner = zipped({"zeros": bytes(unpacked)})
    return zipped({f"{number}.zip": inner for number in range(copies)})


def gzip_bomb(unpacked: int = 600 << 20) -> bytes:
    """Return a gzip file, a thousandth of the size of what it unpacks to."""
    chunk = bytes(1 << 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(chunk) for _ in range(unpacked >> 20)]
    return b"".join(parts) + packer.flush()


def overlapping_zip(names: int = 200) -> bytes:
    """Return a zip whose directory lists one and the same body `names` times (D. Fifield)."""
    body = zlib.compressobj(9, zlib.DEFLATED, -15)
    plain = bytes(1 << 20)
    packed = body.compress(plain) + body.flush()
    crc = zlib.crc32(plain)
    sizes = struct.pack("<III", crc, len(packed), len(plain))
    local = b"PK\3\4" + struct.pack("<HHHHH", 20, 0, 8, 0, 0x21) + sizes
    local += struct.pack("<HH", 1, 0) + b"a" + packed
    entry = b"PK\1\2" + struct.pack("<HHHHHH", 20, 20, 0, 8, 0, 0x21) + sizes
    entry += struct.pack("<HHHHHII", 1, 0, 0, 0, 0, 0, 0) + b"a"
    directory = entry * names
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, names, names, len(directory), len(local), 0)
    return local + directory + end


def many_entries(count: int = 20_000) -> bytes:
    """Return a zip of `count` tiny members."""
    return zipped({f"{n:06}": b"%d" % n for n in range(count)}, zipfile.ZIP_STORED)


def encrypted_zip(payload: bytes, *, aes: bool) -> bytes:
    """Return a zip whose only member needs a password: WinZip AES, or the old ZipCrypto."""
    if not aes:
        return _zipcrypto(payload)
    import pyzipper

    out = io.BytesIO()
    with pyzipper.AESZipFile(
        out, "w", compression=pyzipper.ZIP_DEFLATED, encryption=pyzipper.WZ_AES
    ) as archive:
        archive.setpassword(PASSWORD.encode())
        archive.writestr("secret", payload)
    return out.getvalue()


def _zipcrypto(payload: bytes) -> bytes:
    keys = [0x12345678, 0x23456789, 0x34567890]

    def crc(key: int, byte: int) -> int:
        return (key >> 8) ^ _CRC_TABLE[(key ^ byte) & 0xFF]

    def update(byte: int) -> None:
        keys[0] = crc(keys[0], byte)
        keys[1] = ((keys[1] + (keys[0] & 0xFF)) * 134775813 + 1) & 0xFFFFFFFF
        keys[2] = crc(keys[2], keys[1] >> 24)

    def encrypt(data: bytes) -> bytes:
        out = bytearray()
        for byte in data:
            mask = keys[2] | 2
            out.append(byte ^ (((mask * (mask ^ 1)) >> 8) & 0xFF))
            update(byte)
        return bytes(out)

    for byte in PASSWORD.encode():
        update(byte)
    check = zlib.crc32(payload)
    body = encrypt(bytes(11) + bytes([check >> 24]) + payload)
    sizes = struct.pack("<III", check, len(body), len(payload))
    name = b"secret"
    local = b"PK\3\4" + struct.pack("<HHHHH", 20, 1, 0, 0, 0x21) + sizes
    local += struct.pack("<HH", len(name), 0) + name + body
    entry = b"PK\1\2" + struct.pack("<HHHHHH", 20, 20, 1, 0, 0, 0x21) + sizes
    entry += struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, 0) + name
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0)
    return local + entry + end


def _crc_table() -> list[int]:
    table = []
    for n in range(256):
        for _ in range(8):
            n = (n >> 1) ^ (0xEDB88320 if n & 1 else 0)  # noqa: PLW2901 - the textbook's loop
        table.append(n)
    return table


_CRC_TABLE = _crc_table()


def seven_zip(payload: bytes, *, encrypted: bool = False, hidden_names: bool = False) -> bytes:
    """Return a 7z archive, with a password if `encrypted`, its directory too if `hidden_names`."""
    import py7zr

    out = io.BytesIO()
    password = PASSWORD if encrypted else None
    with py7zr.SevenZipFile(out, "w", password=password, header_encryption=hidden_names) as archive:
        archive.writestr(payload, "secret")
    return out.getvalue()


def pdf(payload: bytes, *, encrypted: bool = False) -> bytes:
    """Return a PDF with `payload` as an attachment, with a password if `encrypted`."""
    import pypdf

    writer = pypdf.PdfWriter()
    writer.add_blank_page(200, 200)
    writer.add_attachment("payload", payload)
    if encrypted:
        writer.encrypt(PASSWORD, algorithm="AES-256")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def ooxml(payload: bytes) -> bytes:
    """Return something that office programs would call a document."""
    return zipped(
        {
            "[Content_Types].xml": b'<?xml version="1.0"?><Types xmlns="http://schemas.openxmlformats'
            b'.org/package/2006/content-types"/>',
            "word/document.xml": b"<w:document/>",
            "word/embeddings/oleObject1.bin": payload,
        }
    )


def encrypted_ooxml(payload: bytes) -> bytes:
    """Return a document with a password: an OLE2 file with an EncryptedPackage in it."""
    from msoffcrypto.format.ooxml import OOXMLFile

    out = io.BytesIO()
    document = OOXMLFile(io.BytesIO(ooxml(payload)))
    document.encrypt(PASSWORD, out)
    return out.getvalue()


def rar4(payload: bytes, *, encrypted: bool = False, hidden_names: bool = False) -> bytes:
    """Return a RAR 4 archive that stores `payload` as it is (technote.txt of WinRAR 4)."""
    if encrypted or hidden_names:
        payload = bytes(byte ^ 0x5A for byte in payload)

    def block(kind: int, flags: int, body: bytes) -> bytes:
        head = struct.pack("<BHH", kind, flags, 7 + len(body)) + body
        return struct.pack("<H", zlib.crc32(head) & 0xFFFF) + head

    main = block(0x73, 0x0080 if hidden_names else 0, bytes(6))
    sizes = struct.pack(
        "<IIBIIBBHI", len(payload), len(payload), 2, zlib.crc32(payload), 0x5A21, 29, 0x30, 6, 32
    )
    flags = 0x8000 | (0x0004 if encrypted else 0)
    file = block(0x74, flags, sizes + b"secret")
    return b"Rar!\x1a\x07\x00" + main + file + payload + block(0x7B, 0x4000, b"")


def rar5(payload: bytes) -> bytes:
    """Return a RAR 5 archive that stores `payload` as it is (RAR 5.0 archive format)."""

    def vint(number: int) -> bytes:
        out = bytearray()
        while True:
            out.append((number & 0x7F) | (0x80 if number > 0x7F else 0))
            number >>= 7
            if not number:
                return bytes(out)

    def block(body: bytes) -> bytes:
        sized = vint(len(body)) + body
        return struct.pack("<I", zlib.crc32(sized)) + sized

    main = block(vint(1) + vint(0) + vint(0))
    file = block(
        vint(2) + vint(2) + vint(len(payload)) + vint(4) + vint(len(payload)) + vint(0o644)
        + struct.pack("<I", zlib.crc32(payload)) + vint(0) + vint(1) + vint(6) + b"secret"
    )  # fmt: skip
    return b"Rar!\x1a\x07\x01\x00" + main + file + payload + block(vint(5) + vint(0) + vint(0))


def tarred(payload: bytes, mode: str = "w") -> bytes:
    """Return a tar archive; `mode` is that of `tarfile.open`."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        member = tarfile.TarInfo("secret")
        member.size = len(payload)
        archive.addfile(member, io.BytesIO(payload))
    return out.getvalue()


def cut(whole: bytes, part: float = 0.6) -> bytes:
    """Return the first `part` of `whole`, as an upload that broke off leaves it."""
    return whole[: max(1, int(len(whole) * part))]


@contextmanager
def sparse(size: int = 3 << 30, payload: bytes = b"") -> Iterator[int]:
    """Yield a descriptor of a file of `size` bytes that takes up no room, `payload` in front."""
    fd = os.memfd_create("sparse", os.MFD_CLOEXEC)
    try:
        os.write(fd, payload)
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Hostile:
    """One file: how to make it, and the reasons of which an honest engine must give one.

    With `found`, the payload is within reach, so that Infected is the right answer too.
    """

    name: str
    make: Callable[[bytes], bytes]
    reasons: frozenset[str]
    found: bool = False


def filler(payload: bytes) -> bytes:
    """Return `payload` behind noise that no packer makes smaller, so that cutting hits it."""
    import random

    return random.Random(7).randbytes(30_000) + payload


_ENCRYPTED = frozenset({"encrypted"})
_LIMIT = frozenset({"archive-limit", "timed-out"})
_CORRUPT = frozenset({"corrupt"})

HOSTILE: tuple[Hostile, ...] = (
    Hostile("zip-bomb", lambda _: zip_bomb(), _LIMIT),
    Hostile("gzip-bomb", lambda _: gzip_bomb(), _LIMIT | {"too-large"}),
    Hostile("overlapping-zip", lambda _: overlapping_zip(), _LIMIT | _CORRUPT, found=True),
    Hostile("nested-42", lambda p: nested(p, 42), _LIMIT),
    Hostile("many-entries", lambda _: many_entries(), _LIMIT),
    Hostile("zipcrypto", lambda p: encrypted_zip(p, aes=False), _ENCRYPTED),
    Hostile("zip-aes", lambda p: encrypted_zip(p, aes=True), _ENCRYPTED),
    Hostile("zip-aes-in-zip", lambda p: nested(encrypted_zip(p, aes=True), 2), _ENCRYPTED),
    Hostile("7z-encrypted", lambda p: seven_zip(p, encrypted=True), _ENCRYPTED),
    Hostile(
        "7z-hidden-names", lambda p: seven_zip(p, encrypted=True, hidden_names=True), _ENCRYPTED
    ),
    Hostile("pdf-encrypted", lambda p: pdf(p, encrypted=True), _ENCRYPTED),
    Hostile("ooxml-encrypted", encrypted_ooxml, _ENCRYPTED),
    Hostile("rar4-encrypted", lambda p: rar4(p, encrypted=True), _ENCRYPTED),
    Hostile("rar4-hidden-names", lambda p: rar4(p, hidden_names=True), _ENCRYPTED),
    Hostile("zip-cut", lambda p: cut(zipped({"a": filler(p)})), _CORRUPT),
    Hostile("zip-stored-cut", lambda p: cut(zipped({"a": filler(p)}, 0)), _CORRUPT),
    Hostile("zip-without-end", lambda p: zipped({"a": filler(p)})[:-10], _CORRUPT, found=True),
    Hostile("gzip-cut", lambda p: cut(gzip.compress(filler(p))), _CORRUPT),
    Hostile("gzip-without-crc", lambda p: gzip.compress(filler(p))[:-6], _CORRUPT, found=True),
    Hostile("bz2-cut", lambda p: cut(bz2.compress(filler(p))), _CORRUPT),
    Hostile("xz-cut", lambda p: cut(lzma.compress(filler(p))), _CORRUPT),
    Hostile("7z-cut", lambda p: cut(seven_zip(filler(p))), _CORRUPT),
    Hostile("tar-cut", lambda p: cut(tarred(filler(p))), _CORRUPT),
    Hostile("tgz-cut", lambda p: cut(tarred(filler(p), "w:gz")), _CORRUPT),
    Hostile("rar4-cut", lambda p: cut(rar4(filler(p))), _CORRUPT),
    Hostile("rar5-cut", lambda p: cut(rar5(filler(p))), _CORRUPT),
    Hostile("pdf-cut", lambda p: cut(pdf(filler(p))), _CORRUPT),
    Hostile("ooxml-cut", lambda p: cut(ooxml(filler(p))), _CORRUPT),
)
