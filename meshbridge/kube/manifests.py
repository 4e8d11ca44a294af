"""Objects from directories of YAML: what the API server is where there is one.

An object in a later directory replaces the same object of an earlier one, as a kubelet's status does. Within one
directory an object may be defined once: a policy defined twice in different words is refused, since neither reading may
loosen the other. A file that cannot be read keeps its last readable content in force until it is mended or removed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from meshbridge.kube.kept import KeptContent
from meshbridge.kube.objects import FileContent, is_policy, read_objects
from meshbridge.kube.problems import Problem, ProblemReason
from meshbridge.kube.yaml import YamlError
from meshbridge.policy.model import Document

SUFFIXES: Final = frozenset({".yaml", ".yml", ".json"})
MAX_FILE_BYTES: Final = 8 << 20
REMOVAL_GRACE_S: Final = 0.02  # an editor that saves by renaming takes the file away for a moment
YOUTH_S: Final = 0.1  # a file found changed without a closing event may still be written to

Key = tuple[str, str, str, str]


@dataclass(frozen=True, slots=True)
class Changes:
    """The definitions now in force of every object that changed; an empty tuple: it is gone.

    ``look_again_s`` is not None when something could not be settled yet and ``refresh`` has to be called again.
    Not ``complete``: not everything was read once yet, so that nothing may be concluded but what the problems say.
    """

    documents: Mapping[Key, tuple[Document, ...]] = field(default_factory=dict)
    look_again_s: float | None = None
    complete: bool = True


_NOTHING: Final = FileContent()
_MISSING: Final = FileNotFoundError()


@dataclass(slots=True)
class _File:
    directory: int
    signature: tuple[int, ...]
    content: FileContent = _NOTHING  # the last readable one
    problem: Problem | None = None
    missing_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Definition:
    directory: int
    path: str
    position: int
    document: Document


@dataclass(slots=True)
class Listing:
    """What some directories hold: of each file its status, or why there is none; ``skip`` are files known better."""

    files: dict[str, tuple[int, os.stat_result | OSError]] = field(default_factory=dict)
    unlisted: set[int] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    skip: set[str] = field(default_factory=set)


class Manifests:
    """The objects defined by some directories; ``refresh`` brings it up to date and tells what changed.

    Cost: ``refresh`` of named files reads these; with a listing it compares inode, size and times of every file and
    reads what differs. Reading costs about half a millisecond for a pod or a small policy.
    """

    def __init__(self, directories: Sequence[Path], kept: KeptContent | None = None) -> None:
        """
        Args:
            kept: where the last readable content of files with policies outlives this process.
        """
        self.directories = tuple(str(directory) for directory in directories)
        self._kept = kept
        self._keep_problem: Problem | None = None
        self.documents: dict[Key, tuple[Document, ...]] = {}
        self._files: dict[str, _File] = {}
        self._definitions: dict[Key, dict[tuple[str, int], _Definition]] = {}
        self._duplicates: dict[Key, Problem] = {}
        self._listing_problems: tuple[Problem, ...] = ()
        self._broken: set[str] = set()
        self._missing: set[str] = set()

    @property
    def problems(self) -> frozenset[Problem]:
        """Everything there is to mend now."""
        found = {*self._duplicates.values(), *self._listing_problems}
        if self._keep_problem is not None:
            found.add(self._keep_problem)
        for path in self._broken:
            file = self._files[path]
            found.update(file.content.problems)
            if file.problem is not None:
                found.add(file.problem)
        return frozenset(found)

    def listing(self) -> Listing:
        """What the directories hold now. Reads nothing of ``self`` that changes, so that a thread may do it."""
        listing = Listing()
        for index, directory in enumerate(self.directories):
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        if is_manifest(entry.name):
                            listing.files[entry.path] = (index, _status(entry.path))
                        elif not entry.name.startswith(".") and entry.is_dir():
                            text = f"{entry.path}: folders inside a manifests directory are not read"
                            text += "; name it with another --manifests"
                            listing.problems.append(Problem(ProblemReason.NOT_READ, text, entry.path))
            except OSError as error:
                text = f"{directory}: cannot be listed: {error.strerror}; what was read from it stays in force"
                listing.problems.append(Problem(ProblemReason.UNREADABLE, text, directory))
                listing.unlisted.add(index)
        return listing

    def refresh(self, now_s: float, wall_s: float, changed: Iterable[Path] | Listing) -> Changes:
        """Read what changed, among files known to be whole, as nobody is writing to them, or of a listing.

        Args:
            now_s: monotonic time, by which files that vanished are given a moment to come back.
            wall_s: the file system's time, by which listed files that may still be written to are left for later.
        """
        waits: list[float] = []
        touched: set[Key] = set()
        if isinstance(changed, Listing):
            self._listing_problems = tuple(changed.problems)
            if self._kept is not None and not self._files and not changed.unlisted:
                self._kept.forget_all_but(changed.files)  # what went while nobody watched
            for path, file in self._files.items():
                if path not in changed.files and path not in changed.skip and file.directory not in changed.unlisted:
                    touched |= self._refresh_file(path, file.directory, _MISSING, now_s, wall_s, waits)
            for path, (index, status) in sorted(changed.files.items()):
                if path in changed.skip:
                    continue
                touched |= self._refresh_file(path, index, status, now_s, wall_s, waits)
        else:
            for path in map(str, changed):
                directory, name = os.path.split(path)
                if directory in self.directories and is_manifest(name):
                    index = self.directories.index(directory)
                    touched |= self._refresh_file(path, index, _status(path), now_s, None, waits)
        for path in list(self._missing):
            touched |= self._confirm_missing(path, now_s, waits)
        return Changes(self._settle(touched), min(waits, default=None))

    def _settle(self, touched: set[Key]) -> dict[Key, tuple[Document, ...]]:
        changed: dict[Key, tuple[Document, ...]] = {}
        for key in touched:
            documents = self._resolve(key)
            if documents != self.documents.get(key, ()):
                changed[key] = documents
                if documents:
                    self.documents[key] = documents
                else:
                    del self.documents[key]
        return changed

    def _refresh_file(
        self,
        path: str,
        index: int,
        status: os.stat_result | OSError,
        now_s: float,
        wall_s: float | None,
        waits: list[float],
    ) -> set[Key]:
        file = self._files.get(path)
        if isinstance(status, FileNotFoundError):
            if file is None or file.missing_since_s is not None:
                return set()
            file.missing_since_s = now_s
            self._missing.add(path)
            return _keys(file.content)  # its objects may have moved to another file already
        touched: set[Key] = set()
        if file is not None and file.missing_since_s is not None:
            file.missing_since_s = None
            self._missing.discard(path)
            touched |= _keys(file.content)
        if isinstance(status, OSError):
            return touched | self._load(path, index, (), status)
        signature = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode)
        if file is not None and file.signature == signature:
            return touched
        if wall_s is not None and file is not None and 0 <= wall_s - status.st_mtime < YOUTH_S:
            waits.append(YOUTH_S)
            return touched
        return touched | self._load(path, index, signature, None)

    def _load(self, path: str, index: int, signature: tuple[int, ...], error: OSError | None) -> set[Key]:
        """Put the content of a file in force; if it has none that can be read, leave the last one and say so."""
        file = self._files.get(path)
        first = file is None
        if file is None:
            file = self._files[path] = _File(index, signature)
        elif file.signature == signature and file.problem is not None:
            return set()
        file.signature, file.problem = signature, None
        line, what, content = 0, "", _NOTHING
        try:
            if error is not None:
                raise error
            written = _read_bytes(path, self.directories[index])
            content = read_objects(written, path)
        except YamlError as unreadable:
            line, what = unreadable.line, str(unreadable)
        except OSError as failed:
            what = f"cannot be read: {failed.strerror}"
        else:
            self._keep(path, written, content)
        if what:
            touched = self._put_content(path, file, self._recalled(path)) if first else set()
            file.problem = _unreadable(file, path, line, what)
            self._broken.add(path)
            return touched
        return self._put_content(path, file, content)

    def _put_content(self, path: str, file: _File, content: FileContent) -> set[Key]:
        old, file.content = file.content, content
        (self._broken.add if content.problems else self._broken.discard)(path)
        return self._define(path, file.directory, old, content)

    def _keep(self, path: str, written: bytes, content: FileContent) -> None:
        if self._kept is None:
            return
        try:
            if any(is_policy(document) for document in content.documents):
                self._kept.save(path, written)
            else:
                self._kept.forget(path)
            self._keep_problem = None
        except OSError as error:
            text = f"{path}: cannot be kept for a restart: {error.strerror}; free the state directory"
            self._keep_problem = Problem(ProblemReason.UNREADABLE, text, path)

    def _recalled(self, path: str) -> FileContent:
        """What a file said last, before this process began."""
        kept = self._kept.load(path) if self._kept is not None else None
        if kept is None:
            return _NOTHING
        try:
            return read_objects(kept, path)
        except YamlError:
            return _NOTHING  # kept by a version that read more than this one

    def _define(self, path: str, index: int, old: FileContent, new: FileContent) -> set[Key]:
        touched = _keys(old) | _keys(new)
        for position, document in enumerate(old.documents):
            definitions = self._definitions[document.key]
            del definitions[path, position]
            if not definitions:
                del self._definitions[document.key]
        for position, document in enumerate(new.documents):
            definition = _Definition(index, path, position, document)
            self._definitions.setdefault(document.key, {})[path, position] = definition
        return touched

    def _confirm_missing(self, path: str, now_s: float, waits: list[float]) -> set[Key]:
        file = self._files[path]
        assert file.missing_since_s is not None
        remaining_s = file.missing_since_s + REMOVAL_GRACE_S - now_s
        if remaining_s > 0:
            waits.append(remaining_s)
            return set()
        del self._files[path]
        self._broken.discard(path)
        self._missing.discard(path)
        if self._kept is not None:
            self._kept.forget(path)
        return self._define(path, file.directory, file.content, _NOTHING)

    def _resolve(self, key: Key) -> tuple[Document, ...]:
        """What holds of all definitions of one object: usually the only one."""
        self._duplicates.pop(key, None)
        definitions = list(self._definitions.get(key, {}).values())
        if len(definitions) > 1:
            present = [d for d in definitions if self._files[d.path].missing_since_s is None]
            definitions = present or definitions
            last = max(d.directory for d in definitions)
            definitions = sorted((d for d in definitions if d.directory == last), key=lambda d: (d.path, d.position))
        if len(definitions) < 2:
            return tuple(d.document for d in definitions)
        return self._report_duplicate(key, [d.document for d in definitions])

    def _report_duplicate(self, key: Key, documents: list[Document]) -> tuple[Document, ...]:
        first, second = documents[0], documents[1]
        differ = any(document.data != first.data for document in documents)
        places = " and ".join(f"{d.source.file}:{d.source.line('')}" for d in documents)
        name = f"{first.namespace}/{first.name}" if first.namespace else first.name
        refused = differ and is_policy(first)
        follows = "refused" if refused else "the first counts" if differ else "they are equal"
        text = f"{first.kind} {name} is defined more than once in one directory: {places}; {follows}; keep one"
        where = (second.source.file, second.source.line(""))
        self._duplicates[key] = Problem(ProblemReason.DUPLICATE, text, *where)
        if not refused:
            return (first,)
        return tuple(replace(document, fault=f"is defined more than once: {places}") for document in documents)


def _keys(content: FileContent) -> set[Key]:
    return {document.key for document in content.documents}


def is_manifest(name: str) -> bool:
    """Whether a file of that name is read."""
    return not name.startswith(".") and os.path.splitext(name)[1] in SUFFIXES


def _unreadable(file: _File, path: str, line: int, what: str) -> Problem:
    place = f"{path}:{line}" if line else path
    kept = len(file.content.documents)
    follows = f"its last readable content ({kept} objects) stays in force" if kept else "nothing of it is in force"
    return Problem(ProblemReason.UNREADABLE, f"{place}: {what}; {follows} until it is mended", path, line)


def _status(path: str) -> os.stat_result | OSError:
    """The status of the file behind ``path``, links followed; a link that leads nowhere is not a missing file."""
    try:
        return os.stat(path)
    except FileNotFoundError as error:
        return OSError(0, "a link to nothing") if os.path.islink(path) else error
    except OSError as error:
        return error


def _read_bytes(path: str, directory: str) -> bytes:
    """The content of a regular file that lies, links followed, inside ``directory``.

    Raises:
        OSError: it does not, is too big, or cannot be read; with a sentence in ``strerror``.
    """
    if os.path.islink(path):
        path = os.path.realpath(path, strict=True)
        if not Path(path).is_relative_to(os.path.realpath(directory)):
            raise OSError(0, f"a link to {path}, outside of the directory; copy the file instead")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise OSError(0, "not a regular file; replace or remove it")
        content = opened.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(0, f"bigger than {MAX_FILE_BYTES} bytes; split it")
    return content
