# SPDX-License-Identifier: Apache-2.0
"""What user code reads, seen by an audit hook: files, folders listed, environment variables, packages.

C libraries that open files by themselves (HDF5, libsndfile) are not seen; Python's own ``open``, numpy, ``sqlite3`` and
imports are.
"""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.digests import env_digest, file_digest, listing_digest, tool_version

if TYPE_CHECKING:
    from types import FrameType

_OURS = Path(__file__).resolve().parents[2]
_ENVIRONMENT = tuple(
    str(Path(folder).resolve()) + os.sep
    for folder in {
        *sysconfig.get_paths().values(),
        *site.getsitepackages(),
        site.getusersitepackages(),
        sys.base_prefix + "/lib",
        str(_OURS),
    }
)
_ELSEWHERE = ("/proc/", "/sys/", "/dev/")
_MAPPING = {"os", "os.py", "_collections_abc", "_collections_abc.py"}
_OWN = {"torch", "numpy", "safetensors", "onnxruntime", "edgekd"}  # their versions are in every key that they touch


class Watch:
    """Collects what is read; ``phase()`` starts a new set of code files."""

    def __init__(self, recipe_dir: Path, own: tuple[Path, ...]) -> None:
        self.recipe_dir = recipe_dir.resolve()
        self._own = tuple(str(folder.resolve()) + os.sep for folder in own)
        self.read: dict[str, None] = {}
        self.listed: dict[str, None] = {}
        self.env: dict[str, None] = {}
        self.active = False
        self._before = set(sys.modules)
        sys.addaudithook(self._heard)
        self._patch_environ()

    def phase(self) -> None:
        """Forget the user's modules, so that the next phase imports all that it needs, and start a new set of files."""
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file and not _is_environment(os.path.realpath(file)):
                del sys.modules[name]
        self._start = dict(self.read)
        self.read = {}

    def files(self) -> list[str]:
        """Return the files that this phase read, then put those of earlier phases back."""
        modules = [getattr(module, "__file__", None) for module in sys.modules.values()]
        sources = [os.path.realpath(file) for file in modules if file]
        found = [path for path in {**self.read, **dict.fromkeys(sources)} if self._is_users(path)]
        self.read = {**self._start, **dict.fromkeys(found)}
        return sorted(found)

    def packages(self) -> dict[str, str]:
        """Return the packages that user code imported, with their versions, but for edgekd's own."""
        from importlib.metadata import packages_distributions

        tops = {name.partition(".")[0] for name in set(sys.modules) - self._before}
        owners = packages_distributions()
        found = {owner for top in tops for owner in owners.get(top, ())} - _OWN
        return {name: version for name in sorted(found) if (version := tool_version(name)) is not None}

    def record(self) -> dict[str, Any]:
        """Return all that was read, as the fields of ``ports.Record``."""
        files = {
            self.name(path): file_digest(Path(path)) if Path(path).is_file() else None
            for path in sorted(self.read)
            if not Path(path).is_dir()
        }
        listings = {self.name(path): listing_digest(Path(path)) for path in sorted(self.listed)}
        return {
            "files": files,
            "listings": listings,
            "env": {name: env_digest(name) for name in sorted(self.env)},
            "modules": self.packages(),
        }

    def name(self, path: str) -> str:
        """Return a path as the record holds it: relative to the recipe's folder where it lies inside."""
        inside = Path(path).is_relative_to(self.recipe_dir)
        return str(Path(path).relative_to(self.recipe_dir)) if inside else path

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
            if isinstance(path, str | bytes | os.PathLike) and not writes and not (mode or "r").startswith(("w", "a", "x")):
                self._note(self.read, path)
        elif event in {"os.listdir", "os.scandir"}:
            path = arguments[0]
            if sys._getframe(1).f_code.co_filename.startswith("<frozen importlib"):  # noqa: SLF001  (as cheap as a look gets)
                return  # the import system looks around; what it finds stands in sys.modules
            if path is None or isinstance(path, str | bytes | os.PathLike):
                self._note(self.listed, path or ".")
        elif event == "sqlite3.connect" and isinstance(arguments[0], str | os.PathLike):
            self._note(self.read, arguments[0])

    def _note(self, where: dict[str, None], path: Any) -> None:
        real = os.path.realpath(os.fsdecode(path))
        if real.endswith(".pyc"):  # its source is what matters, and stands in sys.modules
            return
        if self._is_users(real):
            where[real] = None

    def _is_users(self, real: str) -> bool:
        return not (_is_environment(real) or real.startswith((*_ELSEWHERE, *self._own)))

    def _patch_environ(self) -> None:
        original = os._Environ.__getitem__  # noqa: SLF001  (the one place where all reads pass)
        watch = self

        def getitem(environ: Any, key: Any) -> Any:
            if watch.active and isinstance(key, str) and _called_by_user():
                watch.env[key] = None
            return original(environ, key)

        os._Environ.__getitem__ = getitem  # type: ignore[method-assign]  # noqa: SLF001  (put there on purpose)


def _is_environment(real: str) -> bool:
    return real.startswith(_ENVIRONMENT)


def _called_by_user() -> bool:
    """Return whether the nearest caller outside the mapping's own code is a file of the user."""
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001  (no public way that is as cheap)
    while frame is not None and Path(frame.f_code.co_filename).name.strip("<>").removeprefix("frozen ") in _MAPPING:
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith("<"):
        return False
    return not _is_environment(os.path.realpath(frame.f_code.co_filename))
