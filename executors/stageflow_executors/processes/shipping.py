"""How callables reach workers: by reference where a worker can import them, else by value, once.

Classes and functions of `__main__` (and of modules that only exist in this process) are sent by value and set as
attributes of a module of that name in the worker, so that values pickle by reference both ways. `__main__` itself is
never imported there.

May import `stageflow.core` and `stageflow_executors` only; cloudpickle is loaded when something must go by value.
"""

from __future__ import annotations

import io
import pickle
import sys
import threading
import types
from typing import Any

import msgspec

from stageflow.core.errors import NotShippableError
from stageflow.core.executor import Shipped
from stageflow_executors.shm.codec import find_culprit

StructMeta: Any = type(msgspec.Struct)


def _found_on_path(name: str) -> bool:
    path: Any = None
    prefix = ""
    for part in name.split("."):
        prefix = f"{prefix}.{part}" if prefix else part
        spec = None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            try:
                spec = find(prefix, path, None) if find is not None else None
            except Exception:
                spec = None
            if spec is not None:
                break
        if spec is None:
            return False
        loaded = sys.modules.get(prefix)
        origin = getattr(loaded, "__file__", None)
        if origin is not None and spec.has_location and spec.origin is not None and origin != spec.origin:
            return False  # a file of the same name elsewhere: the worker would import that one
        path = spec.submodule_search_locations
    return True


class _Recorder(pickle.Pickler):
    """Notes every class and function that a pickle refers to."""

    def __init__(self, file: Any, found: list[Any]) -> None:
        super().__init__(file, 5)
        self._found = found

    def reducer_override(self, obj: Any) -> Any:
        """Only looks."""
        if isinstance(obj, type | types.FunctionType):
            self._found.append(obj)
        return NotImplemented


class Shipping:
    """The parent's store of shipped callables, in the form in which workers get them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        #: encoded callables by key; reading needs no lock
        self.known: dict[int, bytes] = {}
        self._importable: dict[str, bool] = {}
        self._bundle: dict[tuple[str, str], Any] = {}
        #: names of modules whose contents travel by value, as they appear in pickles
        self.by_value: tuple[bytes, ...] = (b"__main__",)
        self.version = 0
        #: modules that shipped callables refer to by name, in the order met
        self.modules: dict[str, None] = {}
        self.bundle_data = b""

    def importable(self, module: str) -> bool:
        """Can a worker import `module` by this name?"""
        if module == "__main__":
            return False
        known = self._importable.get(module)
        if known is None:
            known = self._importable[module] = module in sys.builtin_module_names or _found_on_path(module)
            if not known:
                self.by_value = (*self.by_value, module.encode())
        return known

    def data(self, shipped: Shipped) -> bytes:
        """What to send for `shipped`. Raises NotShippableError naming what cannot cross."""
        with self._lock:
            data = self.known.get(shipped.key)
            if data is None:
                data = self.known[shipped.key] = self._dump(shipped.function, shipped.label)
            return data

    def _dump(self, function: Any, label: str) -> bytes:
        found: list[Any] = []
        file = io.BytesIO()
        try:
            _Recorder(file, found).dump(function)
            data = file.getvalue()
        except Exception:
            return self._dump_by_value(function, label)
        local = []
        for obj in found:
            module = obj.__module__ or "builtins"
            if not self.importable(module):
                local.append(obj)
            elif module not in self.modules:
                self.modules[module] = None
        if local:
            self._add(local, label)
        return data

    def _dump_by_value(self, function: Any, label: str) -> bytes:
        data, found = self._cloudpickle(function, label)
        if found:
            self._add(found, label)
            data, _ = self._cloudpickle(function, label)
        return data

    def learn(self, value: Any) -> None:
        """`value` is about to be sent and mentions a by-value module: see that its classes are in the bundle."""
        found: list[Any] = []
        try:
            _Recorder(io.BytesIO(), found).dump(value)
        except Exception:
            return  # it went through cloudpickle, which carries what it needs
        with self._lock:
            local = [obj for obj in found if not self.importable(obj.__module__ or "builtins")]
            if local:
                self._add(local, "a value")

    def _add(self, objects: list[Any], label: str) -> None:
        bundle = self._bundle.copy()  # replaced as a whole: what cannot be sent must not stay and fail all that follow
        fresh, pending = False, list(objects)
        while pending:
            obj = pending.pop()
            name = (obj.__module__, obj.__qualname__.partition(".")[0])
            top = getattr(sys.modules.get(name[0]), name[1], None)
            if top is None or not isinstance(top, type | types.FunctionType) or bundle.get(name) is top:
                continue
            bundle[name], fresh = top, True
            pending.extend(self._cloudpickle(top, label)[1])
        if fresh:
            self.bundle_data = self._cloudpickle(bundle, label)[0]
            self._bundle = bundle
            self.version += 1

    def _cloudpickle(self, value: Any, label: str) -> tuple[bytes, list[Any]]:
        """(pickle by value, objects of by-value modules in it that have a global name)."""
        import cloudpickle

        from stageflow_executors.processes import structs

        self.modules["cloudpickle"] = None
        shipping = self
        found: list[Any] = []

        class Recorder(cloudpickle.Pickler):  # type: ignore[misc]
            def reducer_override(self, obj: Any) -> Any:
                if isinstance(obj, type | types.FunctionType):
                    module = obj.__module__ or "builtins"
                    if shipping.importable(module):
                        shipping.modules[module] = None
                    else:
                        top = getattr(sys.modules.get(module), obj.__qualname__.partition(".")[0], None)
                        if top is not None and "<locals>" not in obj.__qualname__:
                            found.append(obj)
                        if module != "__main__" and module in sys.modules and module not in registered:
                            registered.append(module)
                            cloudpickle.register_pickle_by_value(sys.modules[module])
                if isinstance(obj, StructMeta) and not shipping.importable(obj.__module__):
                    return structs.reduce(obj)
                return super().reducer_override(obj)

        registered: list[str] = []
        for name in self.by_value[1:]:
            module = sys.modules.get(name.decode())
            if module is not None:
                registered.append(name.decode())
                cloudpickle.register_pickle_by_value(module)
        file = io.BytesIO()
        try:
            Recorder(file, 5).dump(value)
        except Exception as error:
            path, _ = find_culprit(value, label)
            raise NotShippableError(
                f"{path} cannot be sent to a worker process: {type(error).__name__}: {error}"[:2000],
                hint="make it an importable function that gets what it needs as arguments, or use executor='thread'",
                path=path,
            ) from error
        finally:
            for name_ in registered:
                cloudpickle.unregister_pickle_by_value(sys.modules[name_])
        return file.getvalue(), found
