"""Files and directories that operating systems and other programs add, told by their names."""

_SYSTEM = frozenset(
    ("__macosx", "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin")
    + ("system volume information", "lost+found", "__pycache__")
)
HIDDEN = "hidden files"


def system_files(name: str) -> str:
    """Return why a file or directory is ignored (hidden, or an operating system's); "" if it is not ignored."""
    for part in name.split("/"):
        if part.startswith(".") and part not in (".", ".."):
            return HIDDEN
        if part.casefold() in _SYSTEM:
            return f"files in {part}"
    return ""
