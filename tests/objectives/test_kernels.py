"""The Triton kernels: equal to references in its interpreter and, where there is one, on a GPU; and fit to compile.

Without triton, which only GPU builds of torch bring along, there is nothing to test; `make test` installs it on Linux.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
IS_MISSING = importlib.util.find_spec("triton") is None
needs_triton = pytest.mark.skipif(
    IS_MISSING, reason="THE GPU KERNELS ARE NOT TESTED: triton is not installed (pip install triton, on Linux)"
)


@needs_triton
@pytest.mark.parametrize(
    ("mode", "what"),
    [
        ("interpreter", ["kernel_cases.py"]),
        ("interpreter", ["test_fused.py", "-k", "no_worse or agreement or rows_give or no_tokens"]),
        ("gpu", ["kernel_cases.py"]),
    ],
    ids=["rows", "losses", "rows on a GPU"],
)
def test_kernels_equal_their_references(mode: str, what: list[str]) -> None:
    """By themselves, and in the losses that use them."""
    if mode == "gpu" and not torch.cuda.is_available():
        pytest.skip("there is no GPU: the kernels are tested in Triton's interpreter only")
    environment = {**os.environ, "TRITON_INTERPRET": "1" if mode == "interpreter" else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / what[0]), *what[1:]]
    got = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert got.returncode == 0, got.stdout[-6000:] + got.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_kernels_compile(capability: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code of a GPU that need not be there: the interpreter takes more than the compiler does."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from poweropd.objectives import kernels, triton_rows

    is_plain = kind == "plain"
    tensors = {"products": "bf16", "student": "bf16", "teacher": "fp16", "bias": "fp32"}
    numbers = {"size": "i32", "stride": "i64", "num_ends": 3}
    constants = {"scale": 1.0 if is_plain else 0.5, "softcap": None if is_plain else 30.0}
    constants |= {"num_ends": 0 if is_plain else 3, "ENDS": 4, "GRADIENT": True, "BLOCK": kernels.BLOCK}
    for kernel in (triton_rows.softmax_rows, triton_rows.reverse_kl_rows):
        signature, fixed = {}, {}
        for place, name in enumerate(kernel.arg_names):
            of_one = name.removeprefix("student_").removeprefix("teacher_")
            if of_one in constants or (is_plain and of_one in ("bias", "end_ids")):
                signature[name], fixed[(place,)] = "constexpr", constants.get(of_one)
            elif of_one.endswith("_ids"):
                signature[name] = "*i64"
            else:
                signature[name] = numbers.get(of_one, f"*{tensors.get(of_one, 'fp32')}")
        source = ASTSource(kernel, signature, constexprs=fixed)
        target = GPUTarget("cuda", capability, 32)
        compiled = compile(source, target=target, options={"num_warps": kernels.WARPS})
        assert compiled.asm["cubin"]


def test_without_triton_or_gpu_they_are_not_available() -> None:
    """And importing the package imports no triton."""
    script = (
        "import sys, torch\n"
        "from poweropd.objectives import kernels, fused\n"
        "print(kernels.available(torch.device('cpu')), 'triton' in sys.modules)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    got = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert got.stdout.split() == ["False", "False"]
