"""Which model a Nexus file was made for: a hash of everything in it that is computed with."""

import hashlib

from kvlocal.files.known_hashes import known_hash
from kvlocal.gguf.container import Container


def base_hash(base: Container) -> str:
    """SHA-256 over name, type, shape and bytes of every tensor, in order of name; the same for a renamed file or other metadata.

    It takes seconds for a gigabyte, so that it is computed once for a file that stays as it is.
    """
    return known_hash(base.path, base.status, "tensors", lambda: _hash(base))


def _hash(base: Container) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(base.tensors.items()):
        digest.update(f"{name}\0{tensor.kind.name}\0{','.join(map(str, tensor.shape))}\0".encode())
        digest.update(tensor.data.data)
    return digest.hexdigest()
