"""Which files of a directory or archive are images, and how the other files are counted."""

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator

from sharding.containers import Files
from sharding.images import SUFFIXES
from sharding.kinds import HEAD, is_image, system_files
from sharding.links import LOST, Member, inside
from sharding.tars import shown

_TYPE = re.compile(r"\.[a-z][a-z0-9]{0,7}")


class Tree:
    """The directories and files of a source, hidden ones (``.name``) and those of operating systems left out. The root is ``""``."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._images: dict[str, list[Member]] = defaultdict(list)
        self._by_name: dict[str, Member] = {}
        self._others: dict[str, str] = {}
        self.by_content = set[str]()
        """Names of images recognized by their first bytes, not by a suffix."""
        members, directories = files.listing()
        for member in members:
            system = system_files(member.name)
            if what := system or self._other(member):
                self._others[member.name] = what
            else:
                self._images[posixpath.dirname(member.name)].append(member)
            if not system:
                self._by_name[member.name] = member
        folders = [name for name in directories if not system_files(name)]
        self._folders = inside([*folders, *map(posixpath.dirname, self._by_name)])

    def _other(self, member: Member) -> str:
        """Return the kind of a file that is not an image, by its suffix or else its first bytes; "" for an image."""
        suffix = _suffix(member.name)
        if member.odd and not (member.odd == LOST and suffix in SUFFIXES):
            return member.odd
        if suffix in SUFFIXES:
            return ""
        if _TYPE.fullmatch(suffix):
            return f"{suffix} files"
        if not is_image(self.files.start_of(member, HEAD)):
            return "files with a suffix of their own" if suffix else "files without a suffix"
        self.by_content.add(member.name)
        return ""

    def folders(self, folder: str) -> list[str]:
        """Return the sorted names of the directories in a directory."""
        return sorted(self._folders.get(folder, ()))

    def images(self, folder: str) -> list[Member]:
        """Return the images directly in a directory, sorted by name."""
        return self._images.get(folder, [])

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

    def left_out(self, used: Collection[str], root: str = "", below: str = "") -> dict[str, int]:
        """Count the files in the directory `below` that are not `used`, by kind, the most frequent kind first.

        Images are counted by the directory below `root` that contains them.
        """
        counts = Counter[str]()
        for name, what in self._others.items():
            counts[what] += name not in used and _inside(name, below)
        for folder, members in self._images.items():
            top = folder.removeprefix(root).lstrip("/").partition("/")[0]
            what = f"images in {shown(top)}" if top and _inside(folder, root) else "images outside all directories"
            counts[what] += sum(member.name not in used and _inside(member.name, below) for member in members)
        return {what: count for what, count in counts.most_common() if count}


def summary(left_out: dict[str, int], most: int = 12) -> str:
    """Say how many of each kind were left out, in one line."""
    parts = [f"{what} {count:,}" for what, count in left_out.items()]
    if rest := list(left_out.values())[most:]:
        parts[most:] = [f"{len(rest)} more kinds {sum(rest):,}"]
    return ", ".join(parts)


def _inside(name: str, folder: str) -> bool:
    return not folder or name == folder or name.startswith(folder + "/")


def _suffix(name: str) -> str:
    """Return a file's suffix in lower case, without the query of a web address: ``.jpg`` for ``1.JPG?w=200``."""
    base = posixpath.basename(name).lower()
    suffix = posixpath.splitext(base)[1]
    return suffix if suffix in SUFFIXES else posixpath.splitext(base.partition("?")[0])[1]
