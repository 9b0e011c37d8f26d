"""Which implementations of the operations models run on, as the forms of a :class:`.specs.Spec` ask."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

from ..models import native
from ..models.plain_ops import plain_formulas


@contextmanager
def running_on(forms: Collection[str]) -> Iterator[None]:
    """Within it, 'plain' runs the reference and 'python' runs without compiled operators."""
    with ExitStack() as stack:
        if 'plain' in forms:
            stack.enter_context(plain_formulas())
        if 'python' in forms:
            stack.enter_context(native.switched_off())
        yield


def operators_in_use() -> bool:
    return native.in_use()
