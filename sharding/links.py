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


def followed(members: Iterable[Member]) -> tuple[list[Member], set[str]]:
    """Return all files of an archive, sorted by name, and the names of directories, as they look with links followed.

    Of two members with the same name the last counts. Raises UserError as `check_walk` does.
    """
    files, folders, links = dict[str, Member](), set[str](), dict[str, str]()
    for member in members:
        files.pop(member.name, None)
        links.pop(member.name, None)
        if member.target:
            links[member.name] = member.target
        elif member.offset >= 0 or member.odd:
            files[member.name] = member
        else:
            folders.add(member.name)
    if not links:
        return sorted(files.values(), key=lambda member: member.name), folders
    return _walked(files, folders, links)


def _walked(files: dict[str, Member], folders: set[str], links: dict[str, str]) -> tuple[list[Member], set[str]]:
    names = inside([*files, *folders, *links])
    names.update({folder: names[folder] for folder in folders})  # keeps empty directories
    members, directories = list[Member](), set[str]()
    entered, walked = {""}, 0
    waiting: list[tuple[str, tuple[str, ...]]] = [("", ("",))]
    while waiting:
        shown, way = waiting.pop()
        for base in names[way[-1]]:
            name, own = posixpath.join(shown, base), posixpath.join(way[-1], base)
            target = _real(own, links)
            if target is not None and target in files:
                members.append(replace(files[target], name=name))
            elif target is None or target not in names or (target != own and target in way):
                members.append(Member(name, odd=LOST))
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
