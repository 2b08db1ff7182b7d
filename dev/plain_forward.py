"""The whole model in plain PyTorch, without this package: logits from a safetensors file.

    python dev/plain_forward.py low.safetensors 299 17 4     # token ids; prints the five likeliest next ids

The file and its JSON are written by scripts.materialize --safetensors.
"""

import json
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


def load(file: str) -> tuple[dict, dict]:
    """(config, weights) of FILE.safetensors and the FILE.json beside it."""
    with open(file.removesuffix(".safetensors") + ".json", encoding="utf-8") as f:
        return json.load(f), load_file(file)


def norm(x, eps: float):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def linear(x, weights: dict, name: str, act: str = "none"):
    """W x, or B(A x) with the config's nonlinearity between the factors."""
    if f"{name}.weight" in weights:
        return x @ weights[f"{name}.weight"].T
    h = x @ weights[f"{name}.A"].T
    if act == "silu":
        h = F.silu(h)
    return h @ weights[f"{name}.B"].T


def rotated(x, angle):
    """Channel i of a head turns together with channel i + D/2. x: (B, heads, T, D), angle: (T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()), dim=-1)


def attention(config: dict, q, k, v, window: int):
    """Softmax attention of q: (B, H, T, D), k and v: (B, K, T, D) -> (B, T, H · D)."""
    T = q.size(2)
    groups = q.size(1) // k.size(1)
    k = k.repeat_interleave(groups, dim=1)  # query heads share key/value heads in order
    v = v.repeat_interleave(groups, dim=1)
    position = torch.arange(T)
    distance = position[:, None] - position  # how far a key is behind its query
    scores = q @ k.mT * config["score_scale"]
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def logits(config: dict, weights: dict, idx):  # (B, T) ids -> (B, T, V)
    model = config["model"]
    eps = config["norm_eps"]
    act = model["factor_act"]
    B, T = idx.shape
    D = model["n_embd"] // model["n_head"]
    frequency = config["rotary_base"] ** (-torch.arange(0, D, 2) / D)
    angle = torch.arange(T)[:, None] * frequency  # (T, D/2)

    x = weights["wte.weight"][idx]
    x = x + weights["smear"] * F.pad(x, (0, 0, 1, 0))[:, :-1]  # a share of the token before
    x = x0 = norm(x, eps)
    for i, layer in enumerate(model["layer_map"] or range(model["n_layer"])):
        block = f"blocks.{layer}"
        x = weights["resid_lambdas"][i] * x + weights["x0_lambdas"][i] * x0

        h = norm(x, eps)
        q, k, v = (linear(h, weights, f"{block}.attn.{name}", act) for name in "qkv")
        if f"value_embeds.{layer}.weight" in weights:
            v = v + weights[f"value_embeds.{layer}.weight"][idx]
        q, k, v = (t.view(B, T, -1, D).transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
        q = norm(rotated(q, angle), eps)
        k = norm(rotated(k, angle), eps)
        x = x + linear(attention(config, q, k, v, config["windows"][i]), weights, f"{block}.attn.o", act)

        h = F.relu(linear(norm(x, eps), weights, f"{block}.mlp.up", act)).square()
        x = x + linear(h, weights, f"{block}.mlp.down", act)

    x = norm(x, eps)
    z = x @ weights["wte.weight"].T if model["tie_embeddings"] else linear(x, weights, "lm_head")
    return config["logit_softcap"] * torch.tanh(z / config["logit_softcap"])


if __name__ == "__main__":
    config, weights = load(sys.argv[1])
    idx = torch.tensor([[int(word) for word in sys.argv[2:]]])
    best = logits(config, weights, idx)[0, -1].softmax(-1).topk(5)
    for probability, token in zip(best.values.tolist(), best.indices.tolist()):
        print(f"{token:8} {probability:.4f}")
