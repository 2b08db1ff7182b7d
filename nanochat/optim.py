"""Optimizers: Muon for the matrices inside the blocks, AdamW for the rest. One function decides which parameter goes where."""
import torch
import torch.distributed as dist

from nanochat.gpt import GPT

# Coefficients (a, b, c) of five polynomial steps X <- aX + b(XXᵀ)X + c(XXᵀ)²X that drive all singular values to 1:
# Polar Express (Amsel et al., arXiv 2505.16932), for singular values in [1e-3, 1] after division by 1.02 ||X||_F.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

# Both factors of a product move in one step, so each moves less than a full matrix would. Of 0.35, 0.5 and 0.7 the best at
# ranks of a third of the width (dev/LOG.md).
FACTOR_SCALE = 0.7


def orthogonalize(X):
    """X: (..., m, n) -> its nearest semi-orthogonal matrix UVᵀ, approximately (singular values within ~[0.9, 1.1])."""
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT  # the Gram matrix below is then on the small side: for a factor, r × r
    for a, b, c in POLAR_EXPRESS:
        G = X @ X.mT                    # (..., m, m)
        X = a * X + (b * G + c * (G @ G)) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon), and evened out (NorMuon,
    arXiv 2510.05491).

    W <- W - lr · (scale · U + weight_decay · W), U = UVᵀ of the Nesterov momentum; then the lines of U along its longer side,
    whose norms differ, are divided by the root of their running mean square, and U is brought back to its Frobenius norm.
    Each group holds matrices of one shape, updated as one batch, and has its own `scale`.
    """

    def __init__(self, groups, lr: float, momentum: float = 0.95, weight_decay: float = 0.0, beta2: float = 0.95):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, scale=1.0, beta2=beta2))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, mu, lr = group["params"], group["momentum"], group["lr"]
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                    self.state[p]["square"] = p.new_zeros(line_shape(p))
                self.state[p]["momentum"].lerp_(p.grad, 1 - mu)
            grads = torch.stack([p.grad for p in params])                          # (count, out, in)
            nesterov = grads.lerp(torch.stack([self.state[p]["momentum"] for p in params]), mu)
            updates = orthogonalize(nesterov.to(matmul_dtype(grads))).to(grads.dtype)
            for p, update in zip(params, updates):
                update = even_out(update, self.state[p]["square"], group["beta2"])
                p.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr * group["scale"])


def even_out(update, square, beta2: float):
    """Divide each line of `update` by the root of its running mean square and restore the norm. square, of `line_shape`,
    is moved on in place.
    """
    square.lerp_(update.square().mean(dim=0 if square.size(0) == 1 else 1, keepdim=True), 1 - beta2)
    even = update / (square.sqrt() + 1e-10)
    return even * (update.norm() / (even.norm() + 1e-10))


def line_shape(p) -> tuple[int, int]:
    """Shape of one number for each row of a tall matrix, or for each column of a wide one."""
    return (p.size(0), 1) if p.size(0) >= p.size(1) else (1, p.size(1))


def muon_momentum(step: int) -> float:
    """From 0.8 to 0.95 over the first 1000 steps: early gradients are soon out of date (as nanochat, faster, from 0.85)."""
    return 0.8 + 0.15 * min(1.0, step / 1000)


def default_matrix_lr(steps: int) -> float:
    """Muon's learning rate for a run of so many steps: 0.04 up to 200 steps, as tuned here (dev/LOG.md), falling with the
    fourth root of the steps to nanochat's 0.02 from 3200 steps on.
    """
    return 0.04 * min(1.0, max(200 / steps, 1 / 16)) ** 0.25


def matmul_dtype(x):
    """bfloat16 is enough for the orthogonalisation, and faster where there are tensor cores."""
    return torch.bfloat16 if x.is_cuda else x.dtype


def update_scale(role: str, out_features: int, in_features: int) -> float:
    """Spectral norm of one update at lr 1, by the role of the parameter: 'weight', or a factor 'A' or 'B'.

    max(1, out/in)^½: the same change of a unit-RMS input's output for every shape (Yang et al., arXiv 2310.17813);
    times FACTOR_SCALE for a factor.
    """
    scale = max(1.0, out_features / in_features) ** 0.5
    return scale if role == "weight" else FACTOR_SCALE * scale


# ---- who gets what --------------------------------------------------------------------------------------------------

def uses_muon(name: str, parameter) -> bool:
    """Muon for the matrices, full or factored, inside the blocks; AdamW for tables, the head and the per-layer scalars."""
    return name.startswith("blocks.") and parameter.ndim == 2


def build_optimizers(model: GPT, *, embedding_lr: float, unembedding_lr: float, matrix_lr: float, scalar_lr: float,
                     weight_decay: float) -> list[torch.optim.Optimizer]:
    """[AdamW, Muon] over all parameters that require gradients, each in exactly one group.

    Every group keeps its `initial_lr`, which the schedule multiplies. Weight decay acts on the Muon matrices only.
    unembedding_lr is for width 768 and scaled by 768 / width: the head sums over the width (arXiv 2203.03466).
    """
    tables, head, scales, scalars, matrices = [], [], [], [], {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if uses_muon(name, p):
            factor = name.rsplit(".", 1)[1]  # 'weight', 'A' or 'B'
            matrices.setdefault((factor, *p.shape), []).append(p)
        elif name.startswith("lm_head.") or (name == "wte.weight" and model.lm_head is None):
            head.append(p)
        elif p.ndim == 2:
            tables.append(p)
        elif name == "resid_lambdas":
            scales.append(p)
        else:
            scalars.append(p)
    adamw = torch.optim.AdamW([dict(params=ps, lr=lr) for ps, lr in
                               ((tables, embedding_lr), (head, unembedding_lr * 768 / model.config.n_embd), (scalars, scalar_lr),
                                (scales, 0.1 * scalar_lr)) if ps],  # these multiply from layer to layer: smaller steps
                              betas=(0.8, 0.98), eps=1e-10, weight_decay=0.0, fused=True)
    muon = Muon([dict(params=ps, scale=update_scale(*key)) for key, ps in matrices.items()], lr=matrix_lr, weight_decay=weight_decay)
    for optimizer in (adamw, muon):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [adamw, muon]


# ---- many processes -------------------------------------------------------------------------------------------------

@torch.no_grad()
def average_gradients(parameters, world_size: int, bucket_elements: int = 2**24):
    """Replace every gradient by its mean over the processes, in buckets of about 64 MB, once a step.

    Not DistributedDataParallel: it regroups its buckets after the first step it sees, so a resumed run would sum in
    another order than an uninterrupted one and differ in the last bits. Buckets in the order of the parameters do not.
    """
    bucket, size = [], 0
    grads = [p.grad for p in parameters if p.grad is not None]
    for i, grad in enumerate(grads):
        bucket.append(grad)
        size += grad.numel()
        if size >= bucket_elements or i == len(grads) - 1:
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            flat /= world_size
            for g, mean in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(mean.view_as(g))
            bucket, size = [], 0
