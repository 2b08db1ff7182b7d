"""Compare the kernels of fused_mlp.py with plain formulas on a CPU, where Triton interprets them.

    TRITON_INTERPRET=1 python tests/fused_mlp_check.py    # needs Triton; run by test_mlp_kernel.py

It ends with an error where they differ. Triton's interpreter multiplies no bfloat16, so it is float32 here.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F

from nanochat import fused_mlp, mlp_kernel, recompute  # noqa: F401  the first defines the operators
from nanochat.compiler import compile_blocks
from nanochat.gpt import GPT, GPTConfig
from nanochat.mlp_kernel import use_mlp_kernel

# rows, R1, R2, M: rows that fill no tile; one power of two, two, and more than the rank
SHAPES = [(200, 320, 320, 128), (70, 192, 64, 192), (65, 512, 512, 64), (33, 48, 112, 64), (9, 16, 448, 64)]


def check_kernels(N: int, R1: int, R2: int, M: int):
    """y and the gradients of x, up and down, against the formula in float64."""
    x = torch.randn(N, R1, dtype=torch.float64, requires_grad=True)
    up = (torch.randn(M, R1, dtype=torch.float64) / R1**0.5).requires_grad_()
    down = (torch.randn(R2, M, dtype=torch.float64) / M**0.5).requires_grad_()
    grad = torch.randn(N, R2, dtype=torch.float64)
    y = F.relu(x @ up.T).square() @ down.T
    expected = (y, *torch.autograd.grad(y, (x, up, down), grad))
    inputs = [tensor.detach().float().requires_grad_() for tensor in (x, up, down)]
    y = torch.ops.nanochat.fused_relu2(*inputs)
    for value, reference in zip((y, *torch.autograd.grad(y, inputs, grad.float())), expected):
        error = ((value.double() - reference).norm() / reference.norm()).item()
        assert value.shape == reference.shape and error < 1e-5, (N, R1, R2, M, error)


def loss_and_gradients(kernel: str, mode: str, compiled: bool = False) -> torch.Tensor:
    """Of a small model, in one vector."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(48, 50, 2, 2, 2, 64, attn_ranks=(16, 16), mlp_ranks=(16, 48), recompute=mode))
    model.init_weights()
    for p in model.parameters():  # nothing stays zero
        p.data += 0.1 * torch.randn_like(p)
    recompute.apply(model)
    use_mlp_kernel(model, kernel)
    if compiled:
        compile_blocks(model, backend="aot_eager")
    tokens = torch.randint(50, (2, 48))
    loss = model(tokens, tokens)
    loss.backward()
    return torch.cat([loss.detach().flatten(), *(p.grad.flatten() for p in model.parameters())])


def main():
    torch.manual_seed(0)
    mlp_kernel.BACKWARD_NUMBERS = 2 * 128 * 128  # so that the backward pass takes several parts
    for shape in SHAPES:
        check_kernels(*shape)
    library = loss_and_gradients("library", "none")
    fused = loss_and_gradients("fused", "none")
    assert not torch.equal(library, fused), "the kernels did not run"
    torch.testing.assert_close(fused, library, rtol=1e-4, atol=1e-5)
    for mode in ("bottleneck", "block"):
        assert torch.equal(loss_and_gradients("fused", mode), fused), mode
        torch.testing.assert_close(loss_and_gradients("fused", mode, True), fused, rtol=1e-4, atol=1e-5)
    print("all agree")


if __name__ == "__main__":
    main()
