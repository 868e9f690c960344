r"""What programs change in the buffers of modules when they run, and how a run leaves no trace there.

    running_mean  <-  (1 - m) running_mean + m batch_mean        once a step, however often the programs run for it

A hook before each module's forward notices which modules run, and their buffers are copied before that. Where there are
no modules nothing is copied.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from pyro_vfe.program.reach import reach


class Buffers:
    """The buffers of the modules that run in a block, as they were before; put back where the block fails."""

    def __init__(self, *, notices: bool = False) -> None:
        """Args:
        notices: Whether modules are noticed as they run; otherwise they have to be told of.
        """
        self.runs = 0
        """How many times the programs have run."""
        self._notices = notices
        self._start: Buffers | None = None
        """Where each run begins that is done while it watches; None for where the last one ended."""
        self._met: dict[int, nn.Module] = {}
        self._kept: dict[int, _Kept] = {}

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Those that have buffers."""
        return tuple(kept.module for kept in self._kept.values())

    @property
    def changed(self) -> tuple[nn.Module, ...]:
        """Those whose buffers hold other numbers now."""
        return tuple(kept.module for kept in self._kept.values() if kept.has_changed)

    @property
    def to_keep(self) -> tuple[nn.Module, ...]:
        """Those to be kept in each step: not data that somebody holds in a buffer, large and the same."""
        return tuple(kept.module for kept in self._kept.values() if kept.size <= _SMALL or kept.has_changed)

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Keeps what the buffers of modules hold, unless that was done before.

        Args:
            modules: Modules that are about to run.
        """
        _keep(modules, (self,), inside=False)

    def put_back(self) -> None:
        """Gives the buffers what they held."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for kept in self._kept.values():
                kept.put_back()

    def __enter__(self) -> "Buffers":
        """Begins to watch."""
        watches = _watches.get()
        self._token = _watches.set((*watches, self))
        self._hook = _hook() if self._notices and not any(watch._notices for watch in watches) else None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Ends; where the block has failed the buffers are put back."""
        _watches.reset(self._token)
        if self._hook is not None:
            self._hook.remove()
        if kind is not None:
            self.put_back()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Runs a block in which each run begins where this began to watch, and which leaves no trace."""
        now = Buffers(notices=True)
        now.add(self.modules)
        now._start = self
        self.put_back()
        with now:
            yield
        now.put_back()


_watches: ContextVar[tuple[Buffers, ...]] = ContextVar("watches over buffers", default=())


class _Kept:
    """A module's buffers, and copies of them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.buffers = {name: (buffer, _copied(buffer)) for name, buffer in module._buffers.items()}
        self.others = _others(module)
        self._has_no_shapes = _has_no_shapes(module)

    @property
    def size(self) -> int:
        """The number of entries."""
        return sum(copy.numel() for _, copy in self.buffers.values() if copy is not None)

    @property
    def has_changed(self) -> bool:
        """Whether the buffers hold other numbers now."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return any(self._differs(name) for name in self.buffers)

    def _differs(self, name: str) -> bool:
        buffer, copy = self.buffers[name]
        now = dict(self.module._buffers.items()).get(name)  # Scripted modules have something like a dict.
        return now is not buffer or (buffer is not None and copy is not None and not torch.equal(buffer, copy))

    def put_back(self) -> None:
        """Writes without telling autograd: graphs that have read the buffers find them as they were."""
        if self._has_no_shapes:
            self._find_shapes()
        if self.others != _others(self.module):
            return  # Its first run has set it up, and a buffer may hold what a flag now says it holds.
        for name, (buffer, copy) in self.buffers.items():
            if self._differs(name):
                self.module._buffers[name] = buffer
                if buffer is not None and copy is not None:
                    buffer.data.copy_(copy)

    def _find_shapes(self) -> None:
        """For a lazy module that has run since: what it begins with."""
        if _has_no_shapes(self.module):
            return
        made, reset = dict(self.module._buffers), getattr(self.module, "reset_running_stats", None)
        self.module._buffers.update({name: _copied(buffer) for name, buffer in made.items()})
        if reset is not None:
            reset()
        self.buffers = {name: (buffer, self.module._buffers[name]) for name, buffer in made.items()}
        self.module._buffers.update(made)
        self.others, self._has_no_shapes = _others(self.module), False


def _has_no_shapes(module: nn.Module) -> bool:
    return any(buffer is not None and is_lazy(buffer) for buffer in module._buffers.values())


def _copied(buffer: Tensor | None) -> Tensor | None:
    """A copy; None of what has no numbers, or none that are compared."""
    if buffer is None or buffer.layout is not torch.strided or buffer.is_meta or is_lazy(buffer):
        return None
    return buffer.detach().clone()


def _others(module: nn.Module) -> dict[str, object]:
    """Numbers and flags that are attributes of a module, and the names of what it has."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN) and name not in _ASIDE}
    return {**plain, "": (*module._parameters.keys(), *module._modules.keys())}


_SMALL = 2**14
"""Entries of a module's buffers that are copied in each step, whether they change or not."""

_PLAIN = (bool, int, float, str, type(None))
_ASIDE = ("training", "_pyro_name")


def _hook() -> RemovableHandle:
    """Has each module noticed before it runs; compiled ones would warn of that at each call, and may well run so."""
    if "torch._dynamo" in sys.modules and not any(
        one[1] is not None and one[1].pattern == _HOOKED for one in warnings.filters
    ):
        warnings.filterwarnings("ignore", message=_HOOKED)
    return register_module_forward_pre_hook(_about_to_run)


_HOOKED = "Using `torch.compile.module.` when there are global hooks"


def _about_to_run(module: nn.Module, inputs: object) -> None:
    notice((module,))


def notice(modules: Iterable[nn.Module], *, inside: bool = True) -> None:
    """Keeps the buffers of modules for all who watch.

    Args:
        modules: Modules that are about to run.
        inside: Whether those of the modules inside them are kept too.
    """
    _keep(modules, _watches.get(), inside)


def _keep(modules: Iterable[nn.Module], watches: tuple[Buffers, ...], inside: bool) -> None:
    for module in modules:
        if all(id(module) in watch._met for watch in watches):
            continue
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for part in module.modules() if inside else (module,):
                _keep_own(part, [watch for watch in watches if id(part) not in watch._met])


def _keep_own(module: nn.Module, watches: list[Buffers]) -> None:
    if not watches or any(map(_is_wrapped, module._buffers.values())):
        return
    kept = _Kept(module) if module._buffers else None
    for watch in watches:
        watch._met[id(module)] = module
        if kept is not None:
            watch._kept[id(module)] = kept


def _is_wrapped(buffer: Tensor | None) -> bool:
    """Whether it stands in for a buffer inside of `torch.func.vmap` and the like."""
    return buffer is not None and is_functorch_wrapped_tensor(buffer)


@contextmanager
def unchanged_buffers(*programs: object) -> Iterator[None]:
    """Runs a block whose runs all begin with the buffers as they are, and which leaves them so.

    Args:
        *programs: Programs that may change the buffers of modules that they do not call.
    """
    watch = Buffers(notices=True)
    watch._start = watch
    with watch:
        notice(reach(*programs).modules)
        yield
    watch.put_back()


@contextmanager
def one_advance() -> Iterator[Callable[[], None]]:
    """Runs a block of runs that together count as one: each module is left as the first run with it left it.

    What it gives has to be called before each run, which then begins where the first one did.
    """
    before, after = Buffers(), Buffers()
    for watch in _watches.get():
        before.add(watch.modules)

    def begin() -> None:
        after.add(before.changed)
        before.put_back()

    _start(_watches.get())
    with before:
        yield begin
        after.add(before.changed)
    after.put_back()


def begin_run() -> None:
    """Counts a run of the programs, and lets it begin where it has to."""
    watches = _watches.get()
    for watch in watches:
        watch.runs += 1
    _start(watches)


def _start(watches: tuple[Buffers, ...]) -> None:
    if watches and watches[-1]._start is not None:
        watches[-1].put_back()
        watches[-1]._start.put_back()
