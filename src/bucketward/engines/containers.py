"""What container a file is, and whether it is whole and open: what engines leave unsaid.

clamd says OK of archives that are cut short, of compression methods that it does not know and of
encrypted Office documents.  `examine` finds that out by reading the structure, and the checksums
where the standard library can unpack, of the outermost container.  It runs in worker processes.
"""

from __future__ import annotations

import bz2
import lzma
import mmap
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from bucketward.engines.workers import Died, Late, Workers
from bucketward.errors import Unavailable
from bucketward.model import Reason, Spooled

EXAMINER_VERSION = 2
"""To be raised with every change here that can change a verdict."""

HEAD = 1024
"""How many bytes of its beginning `kind` wants to see."""

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"PK\x03\x04", "zip"),
    (0, b"PK\x05\x06", "zip"),
    (0, b"PK\x07\x08", "zip"),
    (0, b"PK00PK\x03\x04", "zip"),
    (0, b"\x1f\x8b\x08", "gzip"),
    *((0, b"BZh%d1AY&SY" % level, "bzip2") for level in range(1, 10)),
    *((0, b"BZh%d\x17\x72\x45\x38\x50\x90" % level, "bzip2") for level in range(1, 10)),
    (0, b"\xfd7zXZ\x00", "xz"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    (0, b"Rar!\x1a\x07", "rar"),
    (0, b"MSCF\x00\x00\x00\x00", "cab"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "ole2"),
    (257, b"ustar", "tar"),
    (0, b"070701", "cpio"),
    (0, b"070702", "cpio"),
    (0, b"070707", "cpio"),
    (0, b"\xc7\x71", "cpio"),
    (0, b"\x71\xc7", "cpio"),
    (0, b"!<arch>\n", "ar"),
    (0, b"\xed\xab\xee\xdb", "rpm"),
    (0, b"\x60\xea", "arj"),
    (2, b"-lh", "lha"),
    (2, b"-lz", "lha"),
    (0, b"ITSF", "chm"),
    (0, b"xar!", "xar"),
    (0, b"EGGA", "egg"),
    (0, b"ALZ\x01", "alz"),
    (7, b"**ACE**", "ace"),
    (20, b"\xdc\xa7\xc4\xfd", "zoo"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"\x04\x22\x4d\x18", "lz4"),
    (0, b"\x02\x21\x4c\x18", "lz4"),
    (0, b"LZIP\x00", "lzip"),
    (0, b"LZIP\x01", "lzip"),
    (0, b"\x89LZO\x00\r\n\x1a\n", "lzop"),
    (0, b"LRZI", "lrzip"),
    (0, b"7kSt", "zpaq"),
    (0, b"zPQ", "zpaq"),
    (0, b"\x1f\x9d", "compress"),
    (0, b"\x1f\xa0", "compress"),
    (0, b"\x1f\x1e", "compress"),
    (0, b"\x5d\x00\x00", "lzma"),
    (0, b"hsqs", "squashfs"),
    (0, b"sqsh", "squashfs"),
    (0, b"MSWIM\x00\x00\x00", "wim"),
    (0, b"KDMV", "vmdk"),
    (0, b"QFI\xfb", "qcow"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vhd"),
    (0, b"\x78\x9f\x3e\x22", "tnef"),
    (0, b"{\\rt", "rtf"),
    (0, b"CWS", "swf"),
    (0, b"ZWS", "swf"),
    (0, b"SZDD", "szdd"),
    (0, b"\xe4\x52\x5c\x7b\x8c\xd8\xa7\x4d", "onenote"),
)

_MAIL = re.compile(
    rb"(?:[!-9;-~]{1,76}:[ \t][^\x00]{0,900}?\n)??"
    rb"(?:From |(?:From|Received|Return-Path|Message-ID|MIME-Version|Delivered-To|Subject|To|Date"
    rb"|Content-Type|X-Mailer):[ \t])",
    re.IGNORECASE,
)

_PDF = re.compile(rb"[\x00-\x20\xef\xbb\xbf]{0,64}%PDF-\d")

UNOPENED_BY_CLAMAV = frozenset(
    {
        *("ar", "rpm", "ace", "zoo", "zstd", "lz4", "lzip", "lzop", "lrzip", "zpaq"),
        *("compress", "lzma", "squashfs", "wim", "vmdk", "qcow", "vhdx", "vhd"),
    }
)
"""Containers that ClamAV 1.4 does not look into; it says OK of what is inside."""

# A worker cannot load a codec once it has given up its rights.
"".encode("utf-16-le")

EXAMINED = frozenset(
    {
        *("zip", "gzip", "bzip2", "xz", "7z", "rar", "cab", "ole2", "tar", "pdf"),
    }
)


class Problem(Exception):  # noqa: N818 - a finding about the file, not a failure of ours
    """Why a container was not looked at as a whole."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


_FIRST: dict[int, list[tuple[bytes, str]]] = {}
for _, _magic, _name in (entry for entry in _MAGIC if not entry[0]):
    _FIRST.setdefault(_magic[0], []).append((_magic, _name))
_LATER = tuple(entry for entry in _MAGIC if entry[0])


def kind(head: bytes) -> str:
    """Return what container begins with `head`, "" if it is none that we know."""
    return _by_magic(head) or ("mail" if _MAIL.match(head) else "")


def _by_magic(head: bytes) -> str:
    if not head:
        return ""
    for magic, name in _FIRST.get(head[0], ()):
        if head.startswith(magic) and (name != "lzma" or _is_lzma(head)):
            return name
    for offset, magic, name in _LATER:
        if head.startswith(magic, offset):
            return name
    if _PDF.match(head):
        return "pdf"
    if b"%PDF-" in head and b" obj" in head:
        # Readers look for the mark in the first 1,024 bytes; so do texts about PDF.
        return "pdf-inside"
    return ""


def kind_of(fd: int, size: int) -> str:
    """Return what container `fd` holds, with those told by something else than their beginning."""
    name = kind(os.pread(fd, HEAD, 0))
    if not name and size > 32_774 and os.pread(fd, 5, 32_769) in (b"CD001", b"BEA01"):
        return "iso"
    if not name and size > 512 and os.pread(fd, 4, size - 512) == b"koly":
        return "dmg"
    return name


def _is_lzma(head: bytes) -> bool:
    """Tell the old .lzma format, which has no magic, by its unpacked size: unknown or sane."""
    size = head[5:13]
    return len(size) == 8 and (size == b"\xff" * 8 or size[5:] == bytes(3))


class Examiner:
    """Answers for ClamAV what it does not say; most files are done with after a look at 1 KiB."""

    def __init__(self, *, user: str = "", workers: int = 0) -> None:
        self._workers = Workers("containers", workers or max(2, os.cpu_count() or 1), user=user)

    def examine(
        self, file: Spooled, deadline: float, *, opens_rar: Callable[[], bool] = lambda: False
    ) -> tuple[tuple[str, ...], str]:
        """Return why `file`, of which ClamAV said OK, is not Clean all the same, and in words."""
        name = _by_magic(os.pread(file.fd, HEAD, 0))
        if name in UNOPENED_BY_CLAMAV:
            return (Reason.CONTAINER_UNOPENED,), f"ClamAV does not look into {name} here"
        if name not in EXAMINED:
            return (), ""
        try:
            answer = self._workers.call({"kind": name, "size": file.size}, file.fd, deadline)
            reason, message = str(answer["reason"]), str(answer["message"])
            if not reason and name == "rar" and not opens_rar():
                return (Reason.CONTAINER_UNOPENED,), "this ClamAV was built without RAR"
            return ((Reason(reason),) if reason else ()), message
        except Late:
            return (Reason.TIMED_OUT,), f"no time was left to see whether the {name} file is whole"
        except (Died, KeyError, ValueError) as error:
            raise Unavailable(f"cannot examine a {name} file: {error}", backend="clamav") from error

    def close(self) -> None:
        """End the worker processes."""
        self._workers.close()


def handle(request: Mapping[str, Any], fd: int) -> dict[str, Any]:
    """Answer one request of an `Examiner`, in a worker."""
    problem = examine(fd, request["size"], request["kind"])
    if problem is None:
        return {"reason": "", "message": ""}
    return {"reason": problem.reason, "message": problem.message[:500]}


def examine(fd: int, size: int, name: str) -> Problem | None:
    """Return what is wrong with the container of kind `name`; `None` if nothing could be found.

    Memory stays flat; time is that of unpacking once (zip, gzip, bzip2, xz) or of one pass over
    the directory.
    """
    try:
        with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as data:
            _EXAMINERS[name](data)
    except Problem as problem:
        return problem
    # A parser that stumbles is an answer too: this is no whole file of its kind.
    except Exception as error:
        return Problem(Reason.CORRUPT, f"not a whole {name} file: {type(error).__name__}")
    return None


def _corrupt(message: str) -> Problem:
    return Problem(Reason.CORRUPT, message)


def _unopened(message: str) -> Problem:
    return Problem(Reason.CONTAINER_UNOPENED, message)


_STEP = 1 << 18
_OUT = 1 << 20


def _gzip(data: mmap.mmap) -> None:
    at = 0
    while at < len(data):
        if at and data[at : at + 2] != b"\x1f\x8b":
            # Padding and what else stands behind the last member are no part of it (gzip(1)).
            _no_zip_behind(data, at)
            return
        at = _inflate(data, at, len(data), 31)[0]


def _inflate(data: mmap.mmap, at: int, end: int, window: int) -> tuple[int, int, int]:
    """Unpack one deflate stream; return where it ends, its size and its CRC."""
    unpacker = zlib.decompressobj(window)
    crc = size = 0
    pending = b""
    while not unpacker.eof:
        if not pending:
            pending = data[at : min(at + _STEP, end)]
            if not pending:
                raise _corrupt("a compressed stream is cut short")
            at += len(pending)
        try:
            out = unpacker.decompress(pending, _OUT)
        except zlib.error as error:
            raise _corrupt(f"a compressed stream is damaged: {error}") from error
        pending = unpacker.unconsumed_tail
        size += len(out)
        if window < 0:
            crc = zlib.crc32(out, crc)
    return at - len(unpacker.unused_data), size, crc


def _bzip2(data: mmap.mmap) -> None:
    end, _, _ = _unpack(bz2.BZ2Decompressor(), data, 0, len(data))
    if data[end : end + 3] == b"BZh":
        raise _unopened("ClamAV looks into the first of several bzip2 streams only")


def _xz(data: mmap.mmap) -> None:
    at = 0
    while at < len(data):
        if data[at : at + 4] == bytes(4):
            at += 4
            continue
        try:
            unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 30)
            at, _, _ = _unpack(unpacker, data, at, len(data))
        except lzma.LZMAError as error:
            raise _corrupt(f"a compressed stream is damaged: {error}") from error


def _unpack(
    unpacker: bz2.BZ2Decompressor | lzma.LZMADecompressor, data: mmap.mmap, at: int, end: int
) -> tuple[int, int, int]:
    crc = size = 0
    while not unpacker.eof:
        part = b""
        if unpacker.needs_input:
            part = data[at : min(at + _STEP, end)]
            if not part:
                raise _corrupt("a compressed stream is cut short")
            at += len(part)
        try:
            out = unpacker.decompress(part, _OUT)
        except OSError as error:
            raise _corrupt(f"a compressed stream is damaged: {error}") from error
        size += len(out)
        crc = zlib.crc32(out, crc)
    return at - len(unpacker.unused_data), size, crc


_ZIP_METHODS = frozenset({0, 6, 8, 9, 12})
"""What unzip.c of ClamAV 1.4 unpacks: stored, imploded, deflated, deflate64, bzip2."""


def _zip(data: mmap.mmap) -> None:
    """Check the directory, every member's place and its checksum (APPNOTE.TXT 6.3)."""
    bounds = []
    for flags, method, crc, packed, plain, offset in _zip_directory(data):
        if flags & 0x2041:
            raise Problem(Reason.ENCRYPTED, "a member of the zip archive needs a password")
        head = data[offset : offset + 30]
        if head[:4] != b"PK\x03\x04":
            raise _corrupt("a member of the zip archive is not where the directory says")
        names, extra = struct.unpack_from("<HH", head, 26)
        start = offset + 30 + names + extra
        if start + packed > len(data):
            raise _corrupt("a member of the zip archive is cut short")
        bounds.append((offset, start + packed))
        if method not in _ZIP_METHODS:
            raise _unopened(f"ClamAV does not unpack method {method} of zip archives")
        if method == 8:
            _, size, found = _inflate(data, start, start + packed, -15)
        elif method == 12:
            _, size, found = _unpack(bz2.BZ2Decompressor(), data, start, start + packed)
        elif method == 0:
            size, found = packed, _crc(data, start, start + packed)
        else:
            continue
        if (size, found) != (plain, crc):
            raise _corrupt("a member of the zip archive does not have its checksum")
    bounds.sort()
    for (_, end), (start, _) in pairwise([(0, 0), *bounds]):
        if start < end:
            raise Problem(Reason.ARCHIVE_LIMIT, "members of the zip archive overlap")
        # Who reads it as a stream unpacks this; ClamAV goes by the directory alone, and of two
        # archives in one file it looks into neither.
        if data.find(b"PK\x03\x04", end, start) >= 0:
            raise _unopened("the zip archive has a member that its directory does not name")


def _no_zip_behind(data: mmap.mmap, at: int) -> None:
    """Refuse a zip archive behind the end of another: unzip(1) opens that, ClamAV does not."""
    if data.rfind(b"PK\x05\x06", max(at, len(data) - 65_557)) >= 0:
        raise _unopened("a zip archive stands behind the end of this one")


def _crc(data: mmap.mmap, start: int, end: int) -> int:
    crc = 0
    for at in range(start, end, _OUT):
        crc = zlib.crc32(data[at : min(at + _OUT, end)], crc)
    return crc


def _zip_directory(data: mmap.mmap) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Yield flags, method, CRC, packed and plain size and offset of every member."""
    tail = max(0, len(data) - 65_557)
    end = data.rfind(b"PK\x05\x06", tail)
    if end < 0 or end + 22 > len(data):
        raise _corrupt("the zip archive has no directory: it is cut short")
    disk, first, here, count, size, offset = struct.unpack_from("<HHHHII", data, end + 4)
    stop = end
    if 0xFFFF in (here, count) or 0xFFFFFFFF in (size, offset):
        locator = end - 20
        if locator >= 0 and data[locator : locator + 4] == b"PK\x06\x07":
            (record,) = struct.unpack_from("<Q", data, locator + 8)
            if data[record : record + 4] != b"PK\x06\x06":
                raise _corrupt("the zip archive has no directory where it should be")
            disk, first, here, count, size, offset = struct.unpack_from(
                "<IIQQQQ", data, record + 16
            )
            stop = record
    if disk or first or here != count:
        raise _unopened("one part of a zip archive of several")
    # Bytes in front of the archive, such as a program that unpacks it, move everything.
    moved = stop - size - offset
    if moved < 0:
        raise _corrupt("the zip archive is cut short")
    at = stop - size
    found = 0
    # As far as it goes, not as many as it says: a count of more than 65,535 may be cut (zip64).
    while at < stop and data[at : at + 4] != b"PK\x05\x05":
        if data[at : at + 4] != b"PK\x01\x02" or at + 46 > stop:
            raise _corrupt("the directory of the zip archive is damaged")
        found += 1
        flags, method = struct.unpack_from("<HH", data, at + 8)
        crc, packed, plain = struct.unpack_from("<III", data, at + 16)
        names, extra, comment = struct.unpack_from("<HHH", data, at + 28)
        (where,) = struct.unpack_from("<I", data, at + 42)
        if 0xFFFFFFFF in (packed, plain, where):
            packed, plain, where = _zip64(
                data[at + 46 + names : at + 46 + names + extra], packed, plain, where
            )
        yield flags, method, crc, packed, plain, where + moved
        at += 46 + names + extra + comment
    if found % 65_536 != count % 65_536:
        raise _corrupt("the directory of the zip archive has not as many members as it says")


def _zip64(extra: bytes, packed: int, plain: int, where: int) -> tuple[int, int, int]:
    at = 0
    while at + 4 <= len(extra):
        tag, size = struct.unpack_from("<HH", extra, at)
        at += 4
        if tag == 1:
            numbers = [n for (n,) in struct.iter_unpack("<Q", extra[at : at + size // 8 * 8])]
            values = [
                numbers.pop(0) if value == 0xFFFFFFFF else value for value in (plain, packed, where)
            ]
            return values[1], values[0], values[2]
        at += size
    return packed, plain, where


_7Z_CODERS = frozenset(
    bytes.fromhex(code)
    for code in (
        *("00", "21", "030101", "03030103", "0303011b"),
        *("03030205", "03030401", "03030501", "03030701", "03030805"),
    )
)
"""What the 7-Zip code in ClamAV 1.4 unpacks: copy, LZMA, LZMA2, BCJ, BCJ2 and the branch
converters; not PPMd, bzip2, deflate, delta (found by trying each)."""
_7Z_AES = bytes.fromhex("06f10701")


def _7z(data: mmap.mmap) -> None:
    """Check the frame, and what every folder is packed with (7zFormat.txt)."""
    if len(data) < 32:
        raise _corrupt("the 7z archive is cut short")
    (check,) = struct.unpack_from("<I", data, 8)
    if zlib.crc32(data[12:32]) != check:
        raise _corrupt("the 7z archive is damaged")
    offset, size, crc = struct.unpack_from("<QQI", data, 12)
    if 32 + offset + size > len(data):
        raise _corrupt("the 7z archive is cut short")
    if size > 64 << 20:
        raise Problem(Reason.ARCHIVE_LIMIT, "the directory of the 7z archive is too large")
    header = data[32 + offset : 32 + offset + size]
    if zlib.crc32(header) != crc:
        raise _corrupt("the directory of the 7z archive is damaged")
    for _ in range(4):
        if not header or header[0] != 0x17:
            break
        header = _7z_unpack(data, header)
    if header and header[0] == 0x01:
        position = header.find(b"\x04", 1) if header[1:2] == b"\x02" else 1
        reader = _Reader(header, position)
        if reader.byte() == 0x04:
            _7z_streams(reader)


def _7z_unpack(data: mmap.mmap, header: bytes) -> bytes:
    """Unpack a packed directory; only LZMA and copy are in use for it."""
    reader = _Reader(header, 1)
    where, sizes, folders, plain = _7z_streams(reader)
    coders = folders[0]
    packed = data[32 + where : 32 + where + sizes[0]]
    code, properties = coders[0]
    if plain > 256 << 20:
        raise Problem(Reason.ARCHIVE_LIMIT, "the directory of the 7z archive is too large")
    if code == b"\x00":
        return packed
    if len(coders) != 1 or code not in (b"\x03\x01\x01", b"\x21"):
        raise _unopened("the directory of the 7z archive is packed in an unknown way")
    packing: dict[str, int]
    if code == b"\x21":
        # As large as the directory is enough; what is asked for may be 4 GiB.
        packing = {"id": lzma.FILTER_LZMA2, "dict_size": max(plain, 4096)}
    else:
        first, dictionary = properties[0], struct.unpack("<I", properties[1:5])[0]
        packing = {
            "id": lzma.FILTER_LZMA1,
            "dict_size": min(max(dictionary, 4096), max(plain, 4096)),
            "lc": first % 9,
            "lp": first // 9 % 5,
            "pb": first // 45,
        }
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[packing]).decompress(packed, plain)


class _Reader:
    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def bytes(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise _corrupt("the directory of the 7z archive is cut short")
        self._at += count
        return part

    def number(self) -> int:
        first = self.byte()
        mask, value = 0x80, 0
        for place in range(8):
            if not first & mask:
                return value | (first & (mask - 1)) << (8 * place)
            value |= self.byte() << (8 * place)
            mask >>= 1
        return value

    def digests(self, count: int) -> None:
        defined = count
        if not self.byte():
            bits = self.bytes((count + 7) // 8)
            defined = sum(byte.bit_count() for byte in bits)
        self.bytes(4 * defined)


def _7z_streams(reader: _Reader) -> tuple[int, list[int], list[list[tuple[bytes, bytes]]], int]:
    """Read pack and folder information; every coder has to be one that ClamAV knows."""
    where, sizes, folders, plain = 0, [0], [], 0
    tag = reader.byte()
    if tag == 0x06:
        where, count = reader.number(), reader.number()
        tag = reader.byte()
        if tag == 0x09:
            sizes = [reader.number() for _ in range(min(count, 1 << 20))]
            tag = reader.byte()
        if tag == 0x0A:
            reader.digests(count)
            tag = reader.byte()
        tag = reader.byte() if tag == 0 else tag
    if tag == 0x07:
        if reader.byte() != 0x0B:
            raise _corrupt("the directory of the 7z archive is damaged")
        count = reader.number()
        if reader.byte():
            raise _unopened("the folders of the 7z archive are described elsewhere")
        outputs = 0
        for _ in range(min(count, 1 << 20)):
            coders, outs = _7z_folder(reader)
            folders.append(coders)
            outputs += outs
        if reader.byte() == 0x0C:
            unpacked = [reader.number() for _ in range(outputs)]
            plain = max(unpacked, default=0)
    return where, sizes, folders, plain


def _7z_folder(reader: _Reader) -> tuple[list[tuple[bytes, bytes]], int]:
    coders = []
    inputs = outputs = 0
    for _ in range(reader.number()):
        flags = reader.byte()
        code = reader.bytes(flags & 0x0F)
        ins, outs = (reader.number(), reader.number()) if flags & 0x10 else (1, 1)
        properties = reader.bytes(reader.number()) if flags & 0x20 else b""
        inputs, outputs = inputs + ins, outputs + outs
        if code == _7Z_AES:
            raise Problem(Reason.ENCRYPTED, "the 7z archive needs a password")
        if code not in _7Z_CODERS:
            raise _unopened(f"ClamAV does not unpack method {code.hex()} of 7z archives")
        coders.append((code, properties))
        if len(coders) > 32:
            raise _corrupt("the directory of the 7z archive is damaged")
    bonds = outputs - 1
    for _ in range(2 * bonds):
        reader.number()
    packed = inputs - bonds
    if packed > 1:
        for _ in range(packed):
            reader.number()
    return coders, outputs


def _rar(data: mmap.mmap) -> None:
    if data[6:8] == b"\x01\x00":
        _rar5(data)
    elif data[6:7] == b"\x00":
        _rar4(data)
    else:
        raise _unopened("an unknown version of RAR")


def _rar4(data: mmap.mmap) -> None:
    """Walk the blocks (technote.txt of WinRAR 4)."""
    at = 7
    while at < len(data):
        if at + 7 > len(data):
            raise _corrupt("the RAR archive is cut short")
        block, flags, size = struct.unpack_from("<BHH", data, at + 2)
        more = struct.unpack_from("<I", data, at + 7)[0] if flags & 0x8000 else 0
        if block == 0x73:
            if flags & 0x0080:
                raise Problem(Reason.ENCRYPTED, "the RAR archive needs a password")
            if flags & 0x0001:
                raise _unopened("one part of a RAR archive of several")
        if block in (0x74, 0x7A):
            if flags & 0x0004:
                raise Problem(Reason.ENCRYPTED, "a member of the RAR archive needs a password")
            if flags & 0x0100:
                more |= struct.unpack_from("<I", data, at + 32)[0] << 32
        if block == 0x7B:
            return
        if size < 7:
            raise _corrupt("the RAR archive is damaged")
        at += size + more
    if at > len(data):
        raise _corrupt("the RAR archive is cut short")


def _rar5(data: mmap.mmap) -> None:
    """Walk the blocks; one that says "end" is there in every whole archive (RAR 5.0 format)."""

    def number(at: int) -> tuple[int, int]:
        value = 0
        for place in range(10):
            byte = data[at + place]
            value |= (byte & 0x7F) << (7 * place)
            if not byte & 0x80:
                return value, at + place + 1
        raise _corrupt("the RAR archive is damaged")

    at = 8
    while at < len(data):
        size, body = number(at + 4)
        block, cursor = number(body)
        flags, cursor = number(cursor)
        if flags & 0x01:
            _, cursor = number(cursor)
        length = 0
        if flags & 0x02:
            length, cursor = number(cursor)
        if block == 4:
            raise Problem(Reason.ENCRYPTED, "the RAR archive needs a password")
        if block == 5:
            return
        if block == 1 and number(cursor)[0] & 0x01:
            raise _unopened("one part of a RAR archive of several")
        at = body + size + length
    raise _corrupt("the RAR archive is cut short")


def _cab(data: mmap.mmap) -> None:
    """Compare the size in the header (MS-CAB)."""
    (size,) = struct.unpack_from("<I", data, 8)
    (flags,) = struct.unpack_from("<H", data, 30)
    if size > len(data):
        raise _corrupt("the cabinet is cut short")
    if flags & 3:
        raise _unopened("one cabinet of several")


def _tar(data: mmap.mmap) -> None:
    """Walk the members (pax(1))."""
    at = 0
    while at < len(data):
        head = data[at : at + 512]
        if not any(head):
            _no_zip_behind(data, at)
            return
        if len(head) < 512:
            raise _corrupt("the tar archive is cut short")
        stored = int(head[148:156].strip(b" \x00") or b"0", 8)
        summed = sum(head[:148]) + 8 * 32 + sum(head[156:])
        # Some old programs took the bytes for signed numbers.
        high = sum(byte > 127 for byte in head[:148] + head[156:])
        if stored not in (summed, summed - 256 * high):
            raise _corrupt("the tar archive is damaged")
        field = head[124:136]
        if field[0] & 0x80:
            size = int.from_bytes(field, "big") & ((1 << 95) - 1)
        else:
            size = int(field.strip(b" \x00") or b"0", 8)
        # Links, devices and folders have no body, whatever size they bear.
        body = 0 if head[156:157] in b"123456" else size
        at += 512 + (body + 511) // 512 * 512
        # The last block may lack its padding.
        if at - len(data) > 511 - (body - 1) % 512 if body else at > len(data):
            raise _corrupt("the tar archive is cut short")


_PDF_ENCRYPTED = re.compile(rb"/Encrypt\s{0,8}(?:\d{1,10}\s{1,8}\d{1,5}\s{1,8}R|<<)")
_PDF_STREAM = re.compile(rb"(?<!end)stream\r?\n")


def _pdf(data: mmap.mmap) -> None:
    """Look for the end; what is behind it may be padding but no objects (ISO 32000-1, 7.5.5)."""
    end = data.rfind(b"%%EOF")
    if end < 0 or data.rfind(b"startxref", max(0, end - 1024), end) < 0:
        raise _corrupt("the PDF document is cut short: it has no end")
    if data.find(b"endobj", end) >= 0 or re.search(rb"\d \d+ obj\b", data[end : end + 65_536]):
        raise _corrupt("the PDF document is cut short: it goes on behind its last end")
    if _PDF_ENCRYPTED.search(data):
        # With an empty password ClamAV decrypts, but only streams that have a filter.
        for match in _PDF_STREAM.finditer(data):
            start = match.start()
            head = data[max(data.rfind(b"obj", max(0, start - 4096), start), 0) : start]
            body = data[match.end() : match.end() + 64].lstrip()
            if b"/Filter" not in head and not body.startswith((b"<?xpacket", b"<x:xmpmeta")):
                raise Problem(Reason.ENCRYPTED, "the PDF document is encrypted")


_ENCRYPTED_STREAMS = frozenset(
    {
        *("EncryptedPackage", "EncryptedSummary", "DRMContent"),
    }
)


def _ole2(data: mmap.mmap) -> None:
    """Check the sectors, and look for encrypted documents (MS-CFB, MS-OFFCRYPTO, MS-DOC)."""
    if len(data) < 512:
        raise _corrupt("the document is cut short")
    (shift,) = struct.unpack_from("<H", data, 30)
    if shift not in (9, 12):
        raise _corrupt("the document is damaged")
    sector = 1 << shift
    fats, first = struct.unpack_from("<II", data, 44)
    table = _ole2_table(data, sector, fats)
    last = -1
    for base in range(len(table) - 1, -1, -1):
        if table[base] != 0xFFFFFFFF:
            last = base
            break
    # Some writers leave the last sector short.
    if (last + 1) * sector >= len(data):
        raise _corrupt("the document is cut short")
    for name, start in _ole2_entries(data, sector, table, first):
        if name in _ENCRYPTED_STREAMS:
            raise Problem(Reason.ENCRYPTED, "the document needs a password")
        body = data[(start + 1) * sector : (start + 1) * sector + 4096] if start < last + 1 else b""
        if name == "WordDocument" and body[:2] == b"\xec\xa5" and body[11:12] and body[11] & 1:
            raise Problem(Reason.ENCRYPTED, "the document needs a password")
        if name in ("Workbook", "Book") and _has_filepass(body):
            raise Problem(Reason.ENCRYPTED, "the workbook needs a password")


def _ole2_table(data: mmap.mmap, sector: int, fats: int) -> memoryview:
    """Return the allocation table: for every sector the next, 0xFFFFFFFF if it is free."""
    if fats * sector > len(data):
        raise _corrupt("the document is cut short")
    places = list(struct.unpack_from("<109I", data, 76))
    (more,) = struct.unpack_from("<I", data, 68)
    while more < 0xFFFFFFFA and len(places) < fats:
        entries = struct.unpack_from(f"<{sector // 4}I", data, (more + 1) * sector)
        places += entries[:-1]
        more = entries[-1]
    parts = []
    for place in places[:fats]:
        start = (place + 1) * sector
        if start + sector > len(data):
            raise _corrupt("the document is cut short")
        parts.append(data[start : start + sector])
    return memoryview(b"".join(parts)).cast("I")


def _ole2_entries(
    data: mmap.mmap, sector: int, table: memoryview, first: int
) -> Iterator[tuple[str, int]]:
    """Yield name and first sector of every stream."""
    seen = 0
    while first < 0xFFFFFFFA and seen < 10_000:
        body = data[(first + 1) * sector : (first + 2) * sector]
        for at in range(0, len(body) - 127, 128):
            (length,) = struct.unpack_from("<H", body, at + 64)
            if body[at + 66] == 2 and 2 <= length <= 64:
                name = body[at : at + length - 2].decode("utf-16-le", "replace")
                yield name, struct.unpack_from("<I", body, at + 116)[0]
        first = table[first] if first < len(table) else 0xFFFFFFFE
        seen += 1


def _has_filepass(body: bytes) -> bool:
    """Look for the record FILEPASS, near the start of an encrypted workbook (MS-XLS 2.4.117)."""
    at = 0
    while at + 4 <= len(body):
        record, size = struct.unpack_from("<HH", body, at)
        if record == 0x2F:
            return True
        at += 4 + size
    return False


_EXAMINERS: Mapping[str, Callable[[mmap.mmap], None]] = {
    "zip": _zip,
    "gzip": _gzip,
    "bzip2": _bzip2,
    "xz": _xz,
    "7z": _7z,
    "rar": _rar,
    "cab": _cab,
    "tar": _tar,
    "pdf": _pdf,
    "ole2": _ole2,
}
