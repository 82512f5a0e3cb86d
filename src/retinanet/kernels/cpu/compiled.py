"""`compiled`: numba's compiler with the settings that all kernels share, and a cache that cannot do harm."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numba
from numba.core.caching import FunctionCache, NullCache

P = ParamSpec("P")
T = TypeVar("T")

# Rounding may differ in these, so only sums and losses use them; what decides (IoU, thresholds) is IEEE.
CONTRACT = frozenset({"contract", "nsz"})
REASSOCIATE = CONTRACT | {"reassoc"}


def compiled(
    fast: frozenset[str] = frozenset(), *, inline: bool = False
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Compile a function at its first call; the machine code is kept on disk where there is a place for it.

    It runs without the interpreter's lock, so that Python threads share the work (`threads.in_parallel`).
    Division by zero gives infinity as in NumPy: Python's error would be an exit from the loop, and a loop
    with two exits is not vectorised. Nor is a loop that calls a function: `inline` is for those.
    """

    def compile_later(function: Callable[P, T]) -> Callable[P, T]:
        dispatcher: Any = numba.njit(
            function, nogil=True, error_model="numpy", fastmath=set(fast), forceinline=inline
        )
        try:
            dispatcher._cache = _Cache(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written
            dispatcher._cache = _NoCache()
        return cast(Callable[P, T], dispatcher)

    return compile_later


class _Cache(FunctionCache):
    """numba's cache, but what it holds belongs to the sources of all kernels, and no fault of it stops a call.

    numba's own asks only for the file that a function is in, and kernels inline functions of other files.
    """

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), SOURCES)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # a file cut short or of another kind raises whatever its bytes suggest
            with suppress(OSError):
                self.flush()
            found = None
        if found is None:
            _say_once(f"once; kept in {self.cache_path}")
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(Exception):  # a full disk, an index cut short: the function is compiled all the same
            super().save_overload(sig, data)


class _NoCache(NullCache):
    def load_overload(self, sig: Any, target_context: Any) -> Any:
        _say_once("in every process: nothing can be kept. NUMBA_CACHE_DIR names a folder that can be written")


@functools.cache  # one line a process, however many kernels there are
def _say_once(how_often: str) -> None:
    logging.getLogger("retinanet").warning(
        f"compiling the fast paths for this machine, up to half a minute, {how_often}"
    )


def _digest_of_sources() -> str:
    here = Path(__file__).parent
    files = (*sorted(here.glob("*.py")), here.parent.parent / "batches.py")  # the last for `MatchState`
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


SOURCES = _digest_of_sources()
