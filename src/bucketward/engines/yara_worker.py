"""The half of the YARA engine that touches rules and files; it runs in worker processes only."""

import io
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import yara_x

from bucketward.engines import containers

_RULE = re.compile(r"^[ \t]*(?:(?:private|global)[ \t]+)*rule[ \t]+\w", re.MULTILINE)

_COPIED = 64 << 20
"""Smaller files are copied into memory, which is faster and asks for no permission."""

_MATCHES = 100
"""How many matches of one file are reported."""


class Scanner:
    """Compiles rules, or scans with compiled ones; each as a worker's only business."""

    def __init__(self) -> None:
        self._scanner: Any = None

    def handle(self, request: Mapping[str, Any], fd: int) -> dict[str, Any]:
        """Answer ``compile``, ``load`` or ``scan``."""
        if request["do"] == "compile":
            return _compile(fd)
        if request["do"] == "load":
            with os.fdopen(os.dup(fd), "rb") as file:
                file.seek(0)
                self._scanner = yara_x.Scanner(
                    yara_x.Rules.deserialize_from(io.BytesIO(file.read()))
                )
            return {}
        return self._scan(request, fd)

    def _scan(self, request: Mapping[str, Any], fd: int) -> dict[str, Any]:
        size = request["size"]
        self._scanner.set_timeout(int(request["seconds"]) + 1)
        try:
            results = self._look(fd, size)
        except yara_x.TimeoutError:
            return {"late": True}
        matches = [
            (rule.identifier, any(item == ("severity", "suspicious") for item in rule.metadata))
            for rule in results.matching_rules
        ]
        # What is worst comes first, so that cutting never hides it.
        matches.sort(key=lambda match: match[1])
        return {"matches": matches[:_MATCHES], "kind": containers.kind_of(fd, size)}

    def _look(self, fd: int, size: int) -> Any:
        if size > _COPIED:
            try:
                return self._scanner.scan_file(f"/proc/self/fd/{fd}")
            except yara_x.ScanError:
                # A spool file that only its owner may open; its descriptor can be read anyway.
                pass
        data = os.pread(fd, size, 0)
        if len(data) < size:
            raise EOFError("the file is shorter than it was said to be")
        return self._scanner.scan(data)


def _compile(fd: int) -> dict[str, Any]:
    """Replace the sources in `fd`, a JSON object by file name, by the compiled rules."""
    with os.fdopen(os.dup(fd), "r+b") as file:
        file.seek(0)
        sources: dict[str, str] = json.load(file)
        compiler = yara_x.Compiler()
        # A rule may not read files, not even beside it: all are compiled anyway.
        compiler.enable_includes(False)
        count = 0
        for name, source in sorted(sources.items()):
            compiler.new_namespace(name)
            try:
                compiler.add_source(source, origin=name)
            except yara_x.CompileError:
                error = compiler.errors()[0]
                return {
                    "error": f"{name}, line {error['line']}: {error['title']}",
                }
            count += len(_RULE.findall(source))
        rules = compiler.build()
        file.seek(0)
        file.truncate()
        rules.serialize_into(file)
    return {"count": count}
