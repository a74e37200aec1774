"""Where images come from: a folder of class folders, a folder of images, WebDataset tars or Parquet files. From a number to bytes, no
decoding."""

import contextlib
import glob
import hashlib
import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from io import FileIO
from pathlib import Path

import numpy as np

from massl_fast.data.parquet import open_parquet
from massl_fast.data.source import ShardedSource, Source

# fmt: off
EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp",
    ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".tga",
})
# fmt: on
INDEX_FORMAT = 1
MOST_SHARDS = 1_000_000
OPEN_TARS = 64


class FolderSource(Source):
    """One file per image; names are paths relative to the folder, with forward slashes."""

    def read(self, i: int) -> bytes:
        with open(os.path.join(self.path, self.name(i)), "rb") as file:
            return file.read()

    def files(self) -> Iterator[str]:
        return (os.path.join(self.path, self.name(i)) for i in range(len(self)))


class TarSource(ShardedSource):
    """Members of tar files, read in place: nothing is ever extracted, so a member's path is only a name.

    Positions are shard, offset and bytes.
    """

    _open: OrderedDict[int, FileIO]

    def read(self, i: int) -> bytes:
        shard, offset, size = self._positions[i].tolist()
        # A reader holds its own reference, so a file that another thread evicts stays open until the read is done.
        file = self._open.pop(shard, None) or open(self.shards[shard], "rb", buffering=0)  # noqa: SIM115
        data = os.pread(file.fileno(), size, offset)
        self._open[shard] = file
        while len(self._open) > OPEN_TARS:
            self._open.popitem(last=False)
        if len(data) != size:
            raise OSError(f"{self.shards[shard]} ends before this member does")
        return data

    def _forget(self) -> None:
        self._open = OrderedDict()


def open_source(path: str | os.PathLike, exclude: Collection[str] = (), classes: Sequence[str] | None = None) -> Source:
    """Opens images at ``path``, leaving out those named in ``exclude``.

    A folder whose images all lie in sub-folders is labelled by its sub-folders' names, sorted; Parquet by its column ``label``; tars by
    their ``.cls``, ``.json`` (key ``label``, ``cls`` or ``class``) or ``.txt`` members, with names from a ``classes.txt`` beside them where
    there is one.
    ``classes`` fixes the order of the labels, so that a test set agrees with its training set even when a class is missing there.
    Raises ValueError where there is nothing to open.
    """
    path = os.fspath(path)
    shards = [name for name in expand_braces(path) if not os.path.isdir(name)]
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            files = sorted(e.path for e in entries if not e.name.startswith("."))
        tars, tables = ([file for file in files if file.lower().endswith(ending)] for ending in (".tar", ".parquet"))
        source = _open_tars(path, tars) if tars else open_parquet(path, tables) if tables else _open_folder(path)
    elif path.lower().endswith(".parquet"):
        source = open_parquet(path, _existing(path, [name for one in shards for name in sorted(glob.glob(one)) or [one]]))
    elif path.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise ValueError(f"{path} is a compressed tar, which cannot be read at random places. Unpack it to a plain .tar.")
    elif path.lower().endswith(".tar"):
        source = _open_tars(path, _existing(path, shards))
    elif os.path.exists(path):
        raise ValueError(f"{path} is a file, but no .tar and no .parquet. Name a folder of images, WebDataset tars or Parquet.")
    else:
        raise ValueError(f"There is no folder or file {path}. Name a folder of images, WebDataset tars or Parquet files.")
    source = source.without(exclude)
    if classes is not None:
        source.relabel(classes)
    return source


def _existing(path: str, shards: list[str]) -> list[str]:
    missing = [name for name in shards if not os.path.exists(name)]
    if missing:
        ending = os.path.splitext(path)[1].lower()
        raise ValueError(
            f"There is no file {missing[0]}"
            + (f" ({len(missing)} of the {len(shards)} {ending[1:]}s that {path} names are missing)" if len(shards) > 1 else "")
            + f". Name {ending[1:]}s that exist, for instance train-{{000..003}}{ending}."
        )
    return shards


def expand_braces(pattern: str) -> list[str]:
    """``a-{000..003}.tar`` or ``{a,b}.tar`` spelled out, as a shell does it; zeros in front are kept."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        return [pattern]
    first, last, alternatives = match.groups()
    if alternatives is not None:
        middles = alternatives.split(",")
    else:
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        if abs(int(last) - int(first)) >= MOST_SHARDS:
            raise ValueError(f"{pattern} names more than {MOST_SHARDS:,} files.")
        step = 1 if int(first) <= int(last) else -1
        middles = [str(n).zfill(width) for n in range(int(first), int(last) + step, step)]
    tails = expand_braces(pattern[match.end() :])
    if len(middles) * len(tails) > MOST_SHARDS:
        raise ValueError(f"{pattern} names more than {MOST_SHARDS:,} files.")
    return [pattern[: match.start()] + middle + tail for middle in middles for tail in tails]


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


# Folders


def _open_folder(path: str) -> FolderSource:
    notes: list[str] = []
    names = sorted(_walk(path, notes), key=os.fsencode)
    if not names:
        raise ValueError(
            f"There are no images in {path}: no file in it ends in one of {' '.join(sorted(EXTENSIONS))}, .tar or .parquet. "
            "Hidden files and folders are not looked at."
        )
    loose = sum("/" not in name for name in names)
    if loose == len(names):
        return FolderSource(path, names, None, (), notes)
    if loose:
        notes.append(
            f"{loose} images lie in {path} itself, beside {len(names) - loose} in its sub-folders: "
            "the sub-folders are not taken for classes."
        )
        return FolderSource(path, names, None, (), notes)
    # An empty sub-folder is a class, too: a test set with the same folders then has the same labels.
    with os.scandir(path) as entries:
        classes = sorted((e.name for e in entries if not e.name.startswith(".") and e.is_dir()), key=os.fsencode)
    position = {name: i for i, name in enumerate(classes)}
    return FolderSource(path, names, [position[name.split("/", 1)[0]] for name in names], classes, notes)


def _walk(root: str, notes: list[str]) -> Iterator[str]:
    """Image files below ``root``, relative to it. Follows links, but never into a folder that it is already inside of."""
    stack: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", (_identity(root),))]
    dead, loops, closed = [], [], []
    while stack:
        folder, above = stack.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir():
                        identity = _identity(entry.path)
                        if identity in above:
                            loops.append(name)
                        else:
                            stack.append((name, (*above, identity)))
                    elif is_image_name(entry.name):
                        if entry.is_file():
                            yield name
                        else:
                            dead.append(name)
        except PermissionError:
            if not folder:
                raise ValueError(f"The folder {root} may not be read by this user.") from None
            closed.append(folder)
    for names, what in (
        (loops, "folders link back to a folder around them and are not followed"),
        (dead, "files are broken links or not plain files and are left out"),
        (closed, "folders may not be read by this user and are left out"),
    ):
        if names:
            notes.append(f"{len(names)} {what}, for instance {names[0]}.")


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


# Tars


def _open_tars(path: str, shards: Sequence[str]) -> TarSource:
    names, positions, labels, kinds, notes = [], [], [], set(), []
    common = os.path.commonpath([os.path.dirname(os.path.abspath(shard)) for shard in shards])
    for number, shard in enumerate(shards):
        index = read_index(shard)
        notes += index["notes"]
        short = os.path.relpath(shard, common).replace(os.sep, "/")
        for name, offset, size, kind, label in index["images"]:
            names.append(f"{short}/{name}")
            positions.append((number, offset, size))
            labels.append(label)
            kinds.add(kind)
    if not names:
        raise ValueError(f"There are no images in {path}: no member ends in one of {' '.join(sorted(EXTENSIONS))}.")
    numbers, classes = _tar_classes(labels, kinds, common, notes)
    return TarSource(path, shards, names, np.array(positions, np.int64), numbers, classes, notes)


def _tar_classes(labels: list[str | None], kinds: set[str], folder: str, notes: list[str]) -> tuple[list[int] | None, tuple[str, ...]]:
    """Numbers and names of the classes from the text of the labels: numbers stay as they are, names are sorted."""
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        if known:
            notes.append(f"{len(labels) - len(known)} of {len(labels)} images have no label: all of them are taken as unlabelled.")
        return None, ()
    distinct = set(known)
    if kinds == {"txt"} and 2 * len(distinct) > len(known):
        notes.append("The .txt members look like captions, hardly any occurring twice: the images are taken as unlabelled.")
        return None, ()
    listed = Path(folder, "classes.txt")
    named = tuple(listed.read_text(encoding="utf-8").split("\n")) if listed.is_file() else ()
    named = tuple(name.strip() for name in named if name.strip())
    if all(re.fullmatch(r"\d{1,7}", label) for label in distinct):
        numbers = [int(label) for label in known]
        if named and max(numbers) >= len(named):
            raise ValueError(f"{listed} names {len(named)} classes, but an image is labelled {max(numbers)} (from 0).")
        return numbers, named or tuple(map(str, range(max(numbers) + 1)))
    if named and not distinct <= set(named):
        raise ValueError(f"An image is labelled {min(distinct - set(named))!r}, which {listed} does not name.")
    named = named or tuple(sorted(distinct))
    position = {name: i for i, name in enumerate(named)}
    return [position[label] for label in known], named


def read_index(shard: str) -> dict:
    """Where the images of a tar lie: ``{"images": [[member, offset, bytes, kind of label, label], …], "notes": […]}``.

    Made on first use and kept beside the tar, or in the user's cache where the folder cannot be written; made anew when the
    tar's size or time of change differ. The labels are kept as text.
    """
    status = os.stat(shard)
    stamp = {"format": INDEX_FORMAT, "bytes": status.st_size, "changed_ns": status.st_mtime_ns}
    digest = hashlib.sha256(os.fsencode(os.path.abspath(shard))).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "massl-fast", "tar_index")
    places = [Path(f"{shard}.index.json"), cache / f"{os.path.basename(shard)}.{digest}.json"]
    for place in places:
        try:
            index = json.loads(place.read_text(encoding="utf-8", errors="surrogateescape"))
            if index["stamp"] == stamp and all(_plausible(row, status.st_size) for row in index["images"]):
                return index
        except (OSError, ValueError, TypeError, KeyError):
            continue
    index = {"stamp": stamp, **_scan_tar(shard, status.st_size)}
    for place in places:
        if _write_whole(place, json.dumps(index)):
            break
    return index


def _write_whole(place: Path, text: str) -> bool:
    """Writes a file that is there whole or not at all; False where the folder is read-only or full."""
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.parent.stat().st_mode & 0o222:  # marked read-only, which does not stop the superuser
            return False
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(place)
        return True
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False


def _plausible(row: list, size: int) -> bool:
    name, offset, length, _, label = row
    return isinstance(name, str) and 0 <= offset <= offset + length <= size and (label is None or isinstance(label, str))


def _scan_tar(shard: str, size: int) -> dict:
    images: list[list] = []
    labels: dict[str, tuple[str, str]] = {}
    notes: list[str] = []
    seen: dict[str, int] = {}
    rank = {"cls": 0, "json": 1, "txt": 2}
    cut = None
    try:
        with tarfile.open(shard, "r:", errorlevel=2) as tar:
            try:
                for member in tar:
                    if not member.isreg() or member.issparse():
                        continue
                    if member.offset_data + member.size > size:
                        cut = member.offset
                        break
                    _, _, extension = member.name.rpartition("/")[2].rpartition(".")
                    extension = extension.lower()
                    if f".{extension}" in EXTENSIONS:
                        count = seen[member.name] = seen.get(member.name, 0) + 1
                        name = member.name if count == 1 else f"{member.name}#{count}"
                        images.append([name, member.offset_data, member.size, _key(member.name)])
                    elif extension in rank and member.size < 1_000_000:
                        key, kept = _key(member.name), None
                        if key not in labels or rank[extension] < rank[labels[key][0]]:
                            file = tar.extractfile(member)
                            assert file is not None  # a regular file
                            kept = _label(extension, file.read())
                        if kept is not None:
                            labels[key] = (extension, kept)
            except (tarfile.TarError, EOFError, OSError, ValueError):
                cut = tar.offset
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{shard} cannot be read as a tar: {error}.") from None
    if cut is None:
        # tarfile takes a damaged header for the end of the archive; a whole archive ends in blocks of zeros.
        with open(shard, "rb") as file:
            file.seek(max(0, end - 512) if end >= size else end)
            block = file.read(512)
        if not block or block.strip(b"\0"):
            cut = end
    if cut is not None:
        notes.append(f"{shard} is cut off or damaged at byte {cut:,} of {size:,}: the {len(images)} images before are used.")
    rows = [[name, offset, length, *labels.get(key, ("", None))] for name, offset, length, key in images]
    return {"images": rows, "notes": notes}


def _key(member: str) -> str:
    """What the files of one WebDataset sample share: the path up to the first dot of the file's name."""
    folder, slash, base = member.rpartition("/")
    return folder + slash + base.split(".", 1)[0]


def _label(extension: str, data: bytes) -> str | None:
    try:
        text = data.decode("utf-8").strip()
        if extension != "json":
            return text or None
        value = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return None
    if isinstance(value, dict):
        value = next((value[key] for key in ("label", "cls", "class") if key in value), None)
    return str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else None
