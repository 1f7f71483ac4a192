"""unpack.py URL SHA256 FOLDER: fetches asyncpg's source package and keeps its tests."""

import hashlib
import io
import pathlib
import sys
import tarfile
import urllib.request

url, expected, folder = sys.argv[1:]
with urllib.request.urlopen(url, timeout=60) as answer:
    package = answer.read()
found = hashlib.sha256(package).hexdigest()
if found != expected:
    sys.exit(f"{url}: sha256 {found}, not {expected}")
with tarfile.open(fileobj=io.BytesIO(package)) as archive:
    for member in archive.getmembers():
        path = pathlib.PurePosixPath(*pathlib.PurePosixPath(member.name).parts[1:])
        if member.isfile() and path.parts[:1] == ("tests",) and ".." not in path.parts:
            place = pathlib.Path(folder, *path.parts)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(archive.extractfile(member).read())
