"""The whole model in plain PyTorch: logits of a file that scripts.materialize --safetensors wrote, and nothing of this package.

python dev/plain_forward.py low.safetensors 299 17 4     ids in, the five likeliest next ids out
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


def logits(config: dict, weights: dict, idx):  # (B, T) ids -> (B, T, V)
    model = config["model"]
    (B, T) = idx.shape
    H = model["n_head"]
    K = model["n_kv_head"]
    D = model["n_embd"] // model["n_head"]

    def linear(
        x, name, act="none"
    ):  # one matrix, or B(A x), with a nonlinearity between the factors where the config says so
        if f"{name}.weight" in weights:
            return x @ weights[f"{name}.weight"].T
        h = x @ weights[f"{name}.A"].T
        return (F.silu(h) if act == "silu" else h) @ weights[f"{name}.B"].T

    def norm(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["norm_eps"])

    position = torch.arange(T)
    angle = position[:, None] * config["rotary_base"] ** (-torch.arange(0, D, 2) / D)  # (T, D/2)

    def heads(
        x, rotated
    ):  # (B, T, heads · D) -> (B, heads, T, D); channel i turns together with channel i + D/2
        x = x.view(B, T, -1, D).transpose(1, 2)
        a, b = x.chunk(2, dim=-1)
        return (
            norm(torch.cat((a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()), dim=-1))
            if rotated
            else x
        )

    x = weights["wte.weight"][idx]
    x = x0 = norm(x + weights["smear"] * F.pad(x, (0, 0, 1, 0))[:, :-1])  # a share of the token before
    for i, block in enumerate(model["layer_map"] or range(model["n_layer"])):

        def layer(x, name):
            return linear(x, f"blocks.{block}.{name}", model["factor_act"])

        x = weights["resid_lambdas"][i] * x + weights["x0_lambdas"][i] * x0
        h = norm(x)
        q = layer(h, "attn.q")
        k = layer(h, "attn.k")
        v = layer(h, "attn.v")
        if f"value_embeds.{block}.weight" in weights:
            v = v + weights[f"value_embeds.{block}.weight"][idx]
        q = heads(q, True)
        k = heads(k, True)
        v = heads(v, False)
        k, v = (
            t.repeat_interleave(H // K, dim=1) for t in (k, v)
        )  # query heads share key/value heads in order
        back = position[:, None] - position  # how far a key is behind its query
        scores = (q @ k.mT * config["score_scale"]).masked_fill(
            (back < 0) | (back >= config["windows"][i]), -torch.inf
        )
        x = x + layer((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), "attn.o")
        x = x + layer(F.relu(layer(norm(x), "mlp.up")).square(), "mlp.down")
    z = norm(x) @ weights["wte.weight"].T if model["tie_embeddings"] else linear(norm(x), "lm_head")
    return config["logit_softcap"] * torch.tanh(z / config["logit_softcap"])


if __name__ == "__main__":
    config, weights = load(sys.argv[1])
    best = (
        logits(config, weights, torch.tensor([[int(word) for word in sys.argv[2:]]]))[0, -1]
        .softmax(-1)
        .topk(5)
    )
    print(
        "\n".join(
            f"{token:8} {probability:.4f}"
            for probability, token in zip(best.values.tolist(), best.indices.tolist())
        )
    )
