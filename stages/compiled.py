"""Functions compiled by numba: on first use, once a process, and kept on disk where the disk can be written."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any


class Compiled:
    """A function that is compiled when it is first called; releases the GIL.

    Args:
        function: plain loops over arrays and numbers, all in one function, so that its cache is one entry.
        signature: numba's signature as text, such as `int64(uint8[::1], int64)`; arrays that are only read may be
            read-only ones when they are named in it as `Array(uint8, 1, "C", readonly=True)`.
    """

    def __init__(self, function: Callable[..., Any], signature: str):
        self._function = function
        self._signature = signature
        self._compiled: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            with self._lock:
                if self._compiled is None:
                    self._compiled = self._compile(cache=True) or self._compile(cache=False)
        return self._compiled(*arguments)

    def _compile(self, cache: bool) -> Callable[..., Any] | None:
        """The compiled function, or None where there is no place for the cache."""
        import numba
        from numba.core.errors import NumbaWarning

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NumbaWarning)  # a cache that can't be written is no news to a user
                return numba.njit(self._signature, nogil=True, cache=cache)(self._function)
        except (RuntimeError, OSError):  # numba finds no folder for its cache, or may not write there
            if not cache:
                raise
            return None
