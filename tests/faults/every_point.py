"""An operation with a fault at each of its calls, one after the other."""

import itertools

import attrs
from faults.disk import failing, open_files

from flash.errors import FlashError

_MOST_POINTS = 2000


@attrs.frozen(kw_only=True)
class Operation:
    """
    A durable operation, and what must be true of its folder.

    `prepare(folder)` returns what the others are given; `act` does it; `sound` holds whatever
    failed, given the error or None; `done` holds once it has succeeded.
    """

    prepare: object
    act: object
    sound: object = lambda given, error: None
    done: object = lambda given: None


def strike_everywhere(root, operation, fault):
    """
    Do the operation with the fault at its first call, its second, and so on until none is left.

    Whatever failed, the operation raises nothing but a `FlashError` with a sentence and a way
    out, leaves no file open, leaves its folder sound, and succeeds when it is done again.
    Returns the number of points.
    """
    for at in itertools.count():
        folder = root / str(at)
        folder.mkdir()
        given = operation.prepare(folder)
        before = open_files()
        error = None
        with failing(folder, fault, at) as disk:
            try:
                operation.act(given)
            except FlashError as caught:
                error = caught
        where = f"call {at} of {fault}"
        assert at < _MOST_POINTS, where
        left = {n: p for n, p in open_files().items() if before.get(n) != p and "flash.db" not in p}
        assert not left, f"{where} leaves {left}"
        if error is not None:
            assert disk.struck, where
            assert error.exit_code == 1, where
            assert str(error), where
            assert error.hint, where
            assert "Traceback" not in str(error), where
        operation.sound(given, error)
        operation.act(given)
        assert operation.done(given) is not False, where
        if not disk.struck:
            return at
    raise AssertionError
