"""Links inside archives are followed as in a directory, so that both list the same files."""

import posixpath
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sharding.errors import UserError

LOST, SPECIAL = "links that lead nowhere or back", "pipes, sockets and devices"
"""Why a member cannot be read."""
_HOPS = 40


@dataclass(frozen=True, slots=True)
class Member:
    """A file: its name inside the source with forward slashes, size in bytes, and its offset, if that is known.

    `odd`: why it cannot be read, if it is not a plain file. Archives also have links, with the member that one leads to,
    relative to the archive, as `target` (it may be missing), and directories, with neither offset nor target.
    `tar`: the number of the tar, where there are several.
    """

    name: str
    size: int = 0
    offset: int = -1
    odd: str = ""
    target: str = ""
    tar: int = 0


def check_walk(walked: int, real: int) -> None:
    """Raise UserError if links lead into the same `real` directories so often that the walk may not end."""
    if walked > 1000 + 10 * real:
        raise UserError(f"links reach the same {real:,} directories by {walked:,} paths; remove some of the links")


class Found:
    """The members of an archive; of two members with the same name the last counts."""

    def __init__(self) -> None:
        self.files: dict[str, Member] = {}
        self.folders: set[str] = set()
        self.links: dict[str, str] = {}

    def add(self, member: Member) -> None:
        """Add a file, a link or a directory."""
        self.files.pop(member.name, None)
        self.links.pop(member.name, None)
        if member.target:
            self.links[member.name] = member.target
        elif member.offset >= 0 or member.odd:
            self.files[member.name] = member
        else:
            self.folders.add(member.name)

    def followed(self) -> tuple[list[Member], set[str]]:
        """Return all files, sorted by name, and the names of directories, as they look with links followed.

        Raises UserError as `check_walk` does.
        """
        if not self.links:
            return sorted(self.files.values(), key=lambda member: member.name), self.folders
        names = inside([*self.files, *self.folders, *self.links])
        names.update({folder: names[folder] for folder in self.folders})  # keeps empty directories
        members: list[Member] = []
        directories: set[str] = set()
        entered, walked = {""}, 0
        waiting: list[tuple[str, tuple[str, ...]]] = [("", ("",))]
        while waiting:
            shown, way = waiting.pop()
            for base in names[way[-1]]:
                name, own = posixpath.join(shown, base), posixpath.join(way[-1], base)
                target = _real(own, self.links)
                if target is not None and target in self.files:
                    members.append(replace(self.files[target], name=name))
                elif target is None or target not in names or (target != own and target in way):
                    members.append(Member(name, 0, odd=LOST))
                else:
                    directories.add(name)
                    entered.add(target)
                    check_walk(walked := walked + 1, len(entered))
                    waiting.append((name, (*way, target)))
        return sorted(members, key=lambda member: member.name), directories


def inside(names: Iterable[str]) -> dict[str, set[str]]:
    """Directory → the names in it, from names of files and directories in a source, whose root is ``""``."""
    found: dict[str, set[str]] = defaultdict(set)
    for name in names:
        while name not in ("", "."):
            folder, base = posixpath.split(name)
            if base in found[folder]:
                break
            found[folder].add(base)
            name = folder
    return found


def _real(name: str, links: Mapping[str, str]) -> str | None:
    """Return the name with every link in it followed; None if it leads outside or in a circle."""
    done, parts, hops = "", name.split("/"), 0
    while parts:
        part = parts.pop(0)
        if part == "..":
            if not done:
                return None
            done = posixpath.dirname(done)
        elif part not in ("", "."):
            done = posixpath.join(done, part)
        if done in links:
            hops += 1
            if hops > _HOPS or links[done].startswith("/"):
                return None
            parts, done = links[done].split("/") + parts, ""
    return done
