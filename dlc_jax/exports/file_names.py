"""Names of files and folders that every file system takes, keeps and tells apart."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence

from dlc_jax.datasets.files import is_junk
from dlc_jax.datasets.labels import composed
from dlc_jax.exports.images import FOLDER_SUFFIXES

CLASS_NAMES = "class_names.json"  # beside the folders of the classes
# Bytes of a name, and of a path below the folder of a class; file systems stop at 255 a name.
_LONGEST = 200
# Windows opens devices by these names, whatever their suffix.
_DEVICES = re.compile(r"(con|prn|aux|nul|clock\$|conin\$|conout\$|(com|lpt)[0-9¹²³])", re.I)


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Returns a folder name for each class: its own name where that is possible."""
    names, taken = [], {CLASS_NAMES}
    for class_name in class_names:
        name = _folder(composed(class_name))  # as `folder:` reads it
        candidates = itertools.chain(
            [name] if len(name.encode()) <= _LONGEST else [], _marked(name, "", class_name)
        )
        name = next(some for some in candidates if _folded(some) not in taken)
        taken.add(_folded(name))
        names.append(name)
    return names


class ImagePaths:
    """Paths of images below the folder of their class, no two the same to any file system."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def add(self, folder: str, class_name: str, sample_id: str, suffix: str) -> str:
        """Returns a path below the folder of all classes, with `/`.

        Folders and file name are those of the id where they can be, without the folder of the
        class.

        Args:
          folder: The folder of the class.
          class_name: Its name.
          sample_id: Any text; may be a path, and may lead anywhere.
          suffix: What the file name gets where it has none that image folders are read by.
        """
        parts = [part for part in sample_id.split("/") if part not in ("", ".", "..")]
        *folders, name = parts or ["_"]
        if class_name in folders:
            folders.remove(class_name)
        stem, ending = os.path.splitext(plain(name))
        if ending.lower() in FOLDER_SUFFIXES:
            suffix = ending
        else:
            stem += ending
        paths = _paths([folder, *map(_folder, folders)], stem, suffix, sample_id)
        return next(path for path in paths if self._take(path))

    def _take(self, path: str) -> bool:
        """Takes the path, and returns True, if it is free."""
        folded = _folded(path)
        folders = {folded[: match.start()] for match in re.finditer("/", folded)}
        if folded in self._files or folded in self._folders or folders & self._files:
            return False
        self._files.add(folded)
        self._folders |= folders
        return True


def plain(name: str) -> str:
    """Returns a name for a file or folder in which only what is unsafe is replaced.

    That is what leads elsewhere, what one of the usual file systems cannot hold, and what readers
    of folders take for hidden.
    """
    name = "".join("_" if _is_unsafe(char) else char for char in name)
    name = re.sub(r"^\.+|[.\s]+$", lambda found: "_" * len(found[0]), name) or "_"
    return f"_{name}" if _DEVICES.fullmatch(name.partition(".")[0].rstrip()) else name


def _folder(name: str) -> str:
    """Returns a name for a folder that readers of image folders do not pass over."""
    name = plain(name)
    return f"_{name}" if is_junk(name) else name


def _is_unsafe(char: str) -> bool:
    return char in '/\\:*?"<>|' or not (char.isprintable() or unicodedata.category(char) == "Zs")


def _paths(folders: Sequence[str], stem: str, suffix: str, sample_id: str) -> Iterator[str]:
    """Yields ever less of an id's own path, and ever more of its hash."""
    below = "/".join([*folders[1:], f"{stem}{suffix}"])
    if len(below.encode()) <= _LONGEST:
        yield f"{folders[0]}/{below}"
        yield "/".join([*folders, next(_marked(stem, suffix, sample_id))])
    for name in _marked(stem, suffix, sample_id):
        yield f"{folders[0]}/{name}"


def _marked(stem: str, suffix: str, of: str) -> Iterator[str]:
    """Yields names with a hash behind the stem, which is cut to fit."""
    for attempt in itertools.count():
        mark = f"-{hashlib.sha256(f'{attempt} {of}'.encode()).hexdigest()[:8]}{suffix}"
        cut = stem.encode()[: _LONGEST - len(mark.encode())].decode(errors="ignore")
        yield f"{cut}{mark}"


def _folded(path: str) -> str:
    """Returns what is the same for paths that some file system takes for the same."""
    path = unicodedata.normalize("NFD", path).casefold()
    return unicodedata.normalize("NFD", path)
