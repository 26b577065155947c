"""Which files of a directory or archive are the images of which class."""

import posixpath
from collections import defaultdict
from collections.abc import Iterator

from sharding.archives import Files, Member
from sharding.images import SUFFIXES


class Tree:
    """The directories and files of a source, hidden ones (``.name``, ``__MACOSX``) left out. The root is ``""``."""

    def __init__(self, files: Files) -> None:
        self._files: dict[str, list[Member]] = defaultdict(list)
        self._folders: dict[str, set[str]] = defaultdict(set)
        self._by_name: dict[str, Member] = {}
        members, directories = files.listing()
        for name in directories:
            self._add_folder(posixpath.normpath(name))
        for member in members:
            name = posixpath.normpath(member.name)
            if not _hidden(name):
                folder = posixpath.dirname(name)
                self._files[folder].append(member)
                self._by_name[name] = member
                self._add_folder(folder)

    def _add_folder(self, name: str) -> None:
        while name not in ("", ".", "/") and not _hidden(name):
            parent = posixpath.dirname(name)
            self._folders[parent].add(posixpath.basename(name))
            name = parent

    def folders(self, folder: str) -> list[str]:
        """Return the sorted names of the directories in a directory."""
        return sorted(self._folders.get(folder, ()))

    def images(self, folder: str) -> list[Member]:
        """Return the images directly in a directory, sorted by name; images are told by the file's suffix."""
        return [member for member in self._files.get(folder, ()) if _is_image(member.name)]

    def images_below(self, folder: str) -> list[Member]:
        """Return the images in a directory and all below it, sorted by name."""
        found = [member for inner in self.walk(folder) for member in self.images(inner)]
        return sorted(found, key=lambda member: member.name)

    def walk(self, folder: str = "") -> Iterator[str]:
        """Yield a directory and all below it, those nearer the root first."""
        level = [folder]
        while level:
            yield from level
            level = [posixpath.join(outer, name) for outer in level for name in self.folders(outer)]

    def find(self, name: str) -> Member | None:
        """Return the file of that full name, if there is one."""
        return self._by_name.get(name)

    def folder_with(self, file: str) -> str | None:
        """Return the directory nearest the root that holds a file of that name."""
        return next((folder for folder in self.walk() if self.find(posixpath.join(folder, file))), None)


def _hidden(name: str) -> bool:
    return any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in name.split("/"))


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in SUFFIXES
