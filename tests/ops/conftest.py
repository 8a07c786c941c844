"""Triton's interpreter without what it does again and again."""

import pytest

from statewise.ops._backend import interpreted


@pytest.fixture(autouse=True, scope="session")
def _language_patched_once_a_launch():
    """The interpreter replaces the functions of triton.language for a launch, and then again in every call of a device
    function, which took a third of the time of these tests. Here what a launch has replaced is left alone."""
    if not interpreted():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    replace, replaced = interpreter._patch_lang, set()

    def once(function):
        languages = {v.__name__ for v in function.__globals__.values() if v is tl or v is tl.core}
        if languages <= replaced:
            return interpreter._LangPatchScope()
        scope, launch = replace(function), not replaced
        replaced.update(languages)
        if launch:
            restore = scope.restore
            scope.restore = lambda: (replaced.clear(), restore())
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield
