"""What tests of several ops share."""

from __future__ import annotations

import pytest
import torch

from statewise.ops._backend import interpreted

# Complex numbers are pairs to a kernel.
_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.complex64: "*fp32",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
}


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Launches become compilations for an H100, for which no GPU is needed: {kernel: its PTX of the last launch}."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.runtime.jit import JITFunction

    found: dict[str, str] = {}

    def launch(self, *args, grid, warmup, **keywords):
        given = dict(zip(self.arg_names, args)) | keywords
        signature, constants, attributes = {}, {}, {}
        for i, p in enumerate(self.params):
            value = given.pop(p.name)
            free = p.do_not_specialize
            if p.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not free):
                signature[p.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[p.name], attributes[(i,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[p.name] = "fp32" if isinstance(value, float) else "i32"
                if value % 16 == 0 and not free:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self, signature=signature, constexprs=constants, attrs=attributes)
        found[self.__name__] = compile(source, target=GPUTarget("cuda", 90, 32), options=given).asm["ptx"]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", launch)
    return found


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
