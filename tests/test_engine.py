"""Generation with a cache against the full forward pass, run again for every token."""

import pytest
import torch
import torch.nn.functional as F

from nanochat import engine
from nanochat.decode_graph import Decoder
from nanochat.engine import GREEDY, Sampling, crop_to_context, generate, next_logits, prefill, sample
from nanochat.gpt import GPT, GPTConfig

LOW = dict(attn_ranks=(4, 8, 16), mlp_ranks=(16, 8, 4), lm_head_rank=8)
PROMPTS = [[49, 3, 7, 1, 30], [49, 8, 8, 2, 5, 4, 17, 6, 1, 22, 9], [49]]


def tiny(**changes) -> GPT:
    """16 positions, windows of 8, 16 and 16 of them; every part of it matters to the output."""
    shape = dict(sequence_len=16, vocab_size=50, n_layer=3, n_head=4, n_kv_head=4, n_embd=32)
    config = GPTConfig(**{**shape, "window_pattern": "SL", **changes})
    torch.manual_seed(0)
    model = GPT(config).double().requires_grad_(False)
    model.init_weights()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def full_logits(model, tokens: list[int]):
    """Logits of the token after these, by the forward pass without a cache."""
    return model(torch.tensor([tokens]), compute_dtype=torch.float64)[0, -1]


# ---- the cache does not change the output


@pytest.mark.parametrize(
    "changes",
    [
        {},
        LOW,
        dict(layer_map=(0, 1, 1, 2, 0), value_embeddings=True),
        dict(n_kv_head=2, value_embeddings=True),
        dict(window_pattern="S", n_kv_head=1, tie_embeddings=True),
        {
            **LOW,
            "factor_act": "silu",
            "recompute": "bottleneck",
            "matrix_ranks": {"v": (3, 0, 8)},
            "mlp_ratio": 1.5,
        },
    ],
)
def test_cached_logits_equal_the_full_forward(changes):
    """One row: to 12 digits. Rows of unequal length begin elsewhere: to 5, as angles are float32."""
    model = tiny(**changes)
    for prompts, tolerance in ([PROMPTS[1]], 1e-12), (PROMPTS, 1e-5):
        rows = [list(prompt) for prompt in prompts]
        logits, cache = prefill(model, rows, 16, torch.float64)
        while True:
            for row, result in zip(rows, logits):
                torch.testing.assert_close(result, full_logits(model, row), atol=tolerance, rtol=0)
            if cache.length == 16:
                break
            new = torch.randint(0, 50, (len(rows), 1))
            rows = [row + token for row, token in zip(rows, new.tolist())]
            logits = next_logits(model, new, torch.float64, cache)


def test_a_text_can_be_read_in_pieces():
    model = tiny(n_kv_head=2)
    text = PROMPTS[1] + PROMPTS[0]
    for padded in (False, True):
        prompts = [text[:4], text[:2]] if padded else [text[:4]]
        _, cache = prefill(model, prompts, 16, torch.float64)
        for start, end in ((4, 10), (10, 11), (11, 14)):
            logits = next_logits(model, torch.tensor([text[start:end]] * len(prompts)), torch.float64, cache)
            for prompt, result in zip(prompts, logits):
                torch.testing.assert_close(
                    result, full_logits(model, prompt + text[4:end]), atol=1e-5, rtol=0
                )


def greedy_texts(model, prompts) -> list[list[int]]:
    """28 tokens after each prompt, every one of them computed anew from a context of 16."""
    texts = []
    for prompt in prompts:
        visible = crop_to_context(prompt, 16)
        text = []
        for _ in range(28):
            text.append(full_logits(model, visible).argmax().item())
            visible = crop_to_context(visible + text[-1:], 16)
        texts.append(text)
    return texts


@pytest.mark.parametrize("changes", [{}, {**LOW, "n_kv_head": 2}])
def test_greedy_text_of_a_batch_is_that_of_each_prompt_computed_anew(changes):
    """Far past the context of 16, where every row goes on from its own first token and its last 8."""
    model = tiny(**changes)
    expected = greedy_texts(model, PROMPTS + [list(range(40))])
    steps = list(generate(model, PROMPTS + [list(range(40))], 28, GREEDY, dtype=torch.float64))
    assert [list(row) for row in zip(*steps)] == expected
    assert len({tuple(row) for row in expected}) == 4, "the prompts matter"


def test_a_text_longer_than_the_context_is_cropped():
    assert crop_to_context(list(range(16)), 16) == list(range(16))
    for tokens in (list(range(17)), [0, 5, *range(2, 17)]):
        assert crop_to_context(tokens, 16) == [0, *range(9, 17)]
    assert crop_to_context([1, 2, 3], 2) == [1, 3]


def test_weights_cast_once_give_what_casting_them_at_every_step_gives():
    model = tiny(**LOW).float()
    texts = [list(generate(m, PROMPTS, 12, dtype=torch.bfloat16)) for m in (model, model.to(torch.bfloat16))]
    assert texts[0] == texts[1]


# ---- sampling


def test_the_draws_of_a_seed_are_those_of_the_plain_loop():
    model = tiny()
    rng = torch.Generator().manual_seed(3)
    tokens = list(PROMPTS[0])
    for _ in range(11):
        probabilities = F.softmax(full_logits(model, tokens) / 0.8, dim=-1)
        tokens.append(torch.multinomial(probabilities, 1, generator=rng).item())
    texts = []
    for seed in (3, 3, 4):
        steps = generate(model, PROMPTS[:1], 11, Sampling(seed=seed), dtype=torch.float64)
        texts.append([token for (token,) in steps])
    assert texts[0] == texts[1] == tokens[5:] and texts[0] != texts[2]


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([[0.5, 0.1, 0.25, 0.15], [0.1, 0.4, 0.2, 0.3]]).log()
    rng = torch.Generator().manual_seed(0)

    def frequencies(row, temperature=1.0, top_k=0, top_p=1.0, n=4000):
        drawn = sample(logits[row].expand(n, 4), temperature, top_k, top_p, rng)
        return (torch.bincount(drawn, minlength=4) / n).tolist()

    for result, expected in (
        (frequencies(0), (0.5, 0.1, 0.25, 0.15)),
        (frequencies(0, top_k=9), (0.5, 0.1, 0.25, 0.15)),
        (frequencies(1, top_k=2), (0, 4 / 7, 0, 3 / 7)),
        (frequencies(0, top_p=0.5), (1, 0, 0, 0)),
        (frequencies(0, top_p=0.6), (2 / 3, 0, 1 / 3, 0)),
        (frequencies(0, top_k=3, top_p=0.8), (2 / 3, 0, 1 / 3, 0)),  # of what top-k has left: 5/9, 5/18, 1/6
        (frequencies(1, top_p=1e-9), (0, 1, 0, 0)),
        (frequencies(1, temperature=0.5), (1 / 30, 16 / 30, 4 / 30, 9 / 30)),
        (frequencies(1, temperature=0), (0, 1, 0, 0)),
        (frequencies(1, temperature=1e-40), (0, 1, 0, 0)),
    ):
        assert result == pytest.approx(expected, abs=0.04), expected
        assert [f > 0 for f in result] == [e > 0 for e in expected], expected


def test_samples_of_a_prompt_share_one_prefill_and_differ(monkeypatch):
    shapes = []

    def record_shape(model, idx, *rest):
        shapes.append(tuple(idx.shape))
        return next_logits(model, idx, *rest)

    class RecordingDecoder(Decoder):
        def __call__(self, tokens):
            shapes.append(tuple(tokens.shape))
            return super().__call__(tokens)

    monkeypatch.setattr(engine, "next_logits", record_shape)
    monkeypatch.setattr(engine, "Decoder", RecordingDecoder)
    steps = list(generate(tiny(), PROMPTS[:2], 4, samples=3, dtype=torch.float64))
    assert shapes == [(2, 11), (6,), (6,), (6,)]
    assert len({tuple(row) for row in zip(*steps)}) == 6
    greedy = list(zip(*generate(tiny(), PROMPTS[:2], 4, GREEDY, samples=3, dtype=torch.float64)))
    assert greedy[0] == greedy[1] == greedy[2] != greedy[3] == greedy[4] == greedy[5]


def test_a_row_ends_at_a_stop_token_and_the_text_with_the_last_row():
    model = tiny()
    rows = [list(row) for row in zip(*generate(model, PROMPTS, 20, GREEDY, dtype=torch.float64))]
    stop = (rows[0][4], rows[1][2])
    ends = []
    for row in rows:
        ends.append(next((i for i, token in enumerate(row) if token in stop), 20))
    assert len(set(ends)) > 1
    for count in (3, 2):
        steps = list(generate(model, PROMPTS[:count], 20, GREEDY, stop=stop, dtype=torch.float64))
        last = max(ends[:count])
        assert len(steps) == last
        expected = [row[:end] + [None] * (last - end) for row, end in zip(rows[:count], ends)]
        assert [list(row) for row in zip(*steps)] == expected


def test_nothing_to_do_and_nothing_to_begin_with():
    assert list(generate(tiny(), PROMPTS, 0)) == []
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="a prompt is empty"):
            next(generate(tiny(), prompts, 3))
