"""What the interpreted cases share: the interpreter exchanges the functions of Triton's language once a launch."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def exchanged_once_a_launch():
    """The interpreter goes through all names of ``triton.language`` whenever a kernel calls a jitted function, those of the language itself
    too; within a launch the first time is enough. That was most of the time of these cases.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    exchange, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done = {}

    def exchanged(function):
        modules = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if modules not in done:
            done[modules] = exchange(function)
        return done[modules]

    def launched(self, *args, **kwargs):
        done.clear()  # at its end a launch gives the names back
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", exchanged)
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        yield
