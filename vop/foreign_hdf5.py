"""Reading HDF5 files of others: only what lies in the file itself.

An HDF5 file may name other files to be read in its place: by links, by datasets whose bytes lie elsewhere, and by
virtual datasets, which are put together from such. All are refused, since reading them would bring the content of any
file that this process may read into the results. A dataset is also refused if it claims more memory than an image's
can need: HDF5 stores what was never written, and what compresses well, in next to nothing.
"""

import h5py

LARGEST = 1 << 30  # bytes of a dataset: 65,536 patches of 4,096 float32, or a depth map of 16,384 x 16,384


class ForeignLinkError(ValueError):
    """A file that refers to what lies outside of it."""


def member(group: h5py.Group, path: str) -> h5py.Group | h5py.Dataset | None:
    """What lies at a path below a group, as `group.get` gives it; None: nothing.

    Raises `ForeignLinkError` if the way leads over a link, or ends in a dataset that lies in other files or claims too
    much memory.
    """
    found = group
    for part in path.split("/"):
        kind = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
        if kind is None:
            return None
        if not isinstance(kind, h5py.HardLink):
            target = f"{getattr(kind, 'filename', '')}:{kind.path}".lstrip(":")
            raise ForeignLinkError(_refused(group, path, f"is a link to {target}"))
        found = found[part]
    if isinstance(found, h5py.Dataset):
        if found.external or found.is_virtual:
            raise ForeignLinkError(_refused(group, path, "takes its values from other files"))
        if found.nbytes > LARGEST:
            raise ForeignLinkError(
                f"{group.file.filename}: {path!r} claims {found.nbytes:,} bytes, more than {LARGEST:,}: not an image's"
            )
    return found


def _refused(group: h5py.Group, path: str, what: str) -> str:
    return (
        f"{group.file.filename}: {path!r} {what}, and files of others are read without following such references; "
        "if you trust the file, copy it with `h5repack` or h5py into one that holds its content itself"
    )
