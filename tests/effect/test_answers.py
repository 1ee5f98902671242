"""Answers that a population generates, and which of them are right."""

from __future__ import annotations

import math

import pytest
import torch
from made_up import record

from effect.answers import (
    TASK,
    VARIANTS,
    generate,
    number,
    prompt_and_answer,
    rows,
    solved,
    wanted,
)
from effect.population import Population
from effect.records import Run
from effect.start import Start
from effect.train import Member
from models import llama

PAD, END = 0, 2


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("so 3\n#### 18", 18),
        ("#### $1,200 a day", 1200),
        ("#### -3.5\n#### 4", -3.5),
        ("#### .5", 0.5),
        ("the answer is 18", None),
        ("#### eighteen", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(answer, expected):
    assert number(answer) == expected


def test_a_row_is_its_prompt_and_its_answer():
    labels = torch.tensor([-100, -100, 7, 8])
    prompt, answer = prompt_and_answer((torch.tensor([5, 6, 7, 8]), labels))
    assert prompt.tolist() == [5, 6] and answer.tolist() == [7, 8]


def starts(model, members):
    """B is not 0, and large: members say different things."""
    found = []
    for k in range(members):
        generator = torch.Generator().manual_seed(k)
        of = {}
        for name, module in model.named_modules():
            if name.endswith(("q_proj", "down_proj")):
                m, n = module.weight.shape
                A, B = (torch.randn(s, generator=generator) for s in ((4, n), (m, 4)))
                of[name] = Start(A, B * k)
        found.append(of)
    return found


def test_every_member_says_what_its_own_model_says():
    torch.manual_seed(0)
    model = llama().requires_grad_(False).eval()
    prompts = [torch.randint(3, 30, (n,)) for n in (5, 3, 7)]
    members = starts(model, 3)
    alone = []
    for start in members:
        merged = llama().eval()
        merged.load_state_dict(model.state_dict())
        for name, one in start.items():
            merged.get_submodule(name).weight.data += one.B @ one.A
        alone.append(
            [
                merged.generate(
                    p[None],
                    attention_mask=torch.ones(1, len(p), dtype=torch.long),
                    do_sample=False,
                    max_new_tokens=6,
                    eos_token_id=END,
                    pad_token_id=PAD,
                )[0, len(p) :].tolist()
                for p in prompts
            ]
        )
    population = Population(model, members)
    said = generate(population, prompts, 6, PAD, END)
    population.close()
    assert said.shape[:2] == (3, 3)
    for k in range(3):
        for i in range(3):
            ids, one = said[k, i].tolist(), alone[k][i]
            assert ids[: len(one)] == one and set(ids[len(one) :]) <= {PAD}, (k, i)
    assert alone[0] != alone[1] != alone[2]


class Numbers:
    """A tokenizer of "#### " and the id."""

    pad_token_id, eos_token_id = PAD, END

    def decode(self, ids):
        return "".join(f"#### {i} " for i in ids.tolist() if i != END)

    def batch_decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return [self.decode(one[one != PAD]) for one in ids]


def test_right_answers_are_counted_by_member(monkeypatch):
    """Of two problems whose references are what member 0 says, member 0 has all right."""
    torch.manual_seed(0)
    model = llama().requires_grad_(False).eval()
    population = Population(model, starts(model, 2))
    prompts = [torch.tensor([5, 6, 9]), torch.tensor([7, 8])]
    said = generate(population, prompts, 4, PAD, END)
    answers = [ids[ids != PAD][:1] for ids in said[0]]
    problems = [
        (torch.cat([p, a]), torch.cat([torch.full_like(p, -100), a]))
        for p, a in zip(prompts, answers, strict=True)
    ]
    cut = torch.tensor([5, END]), torch.tensor([-100, END])  # its answer has no number
    problems.append(cut)
    monkeypatch.setattr("effect.answers.TOKENS", 4)
    first = [int(ids[ids != PAD][0]) for ids in said[1]]
    same = sum(a == int(b) for a, b in zip(first, answers, strict=True)) / 2
    assert solved(population, problems, Numbers()) == [1.0, same]
    population.close()


def test_wanted_is_every_seed_at_the_best_rate():
    losses = {1e-3: 1.1, 3.162e-3: 1.0, 1e-2: 1.2}
    records = [
        record(Run(TASK, Member(v[0], rate, *v[1:], seed)), loss)
        for v in VARIANTS
        for rate, loss in losses.items()
        for seed in range(5)
    ]
    runs = wanted(records, VARIANTS)
    assert len(runs) == 5 * len(VARIANTS) and {run.member.rate for run in runs} == {3.162e-3}
    assert {run.member.seed for run in runs} == set(range(5))
    with pytest.raises(ValueError, match=r"no run of lora on gsm8k"):
        wanted([], VARIANTS)


def test_the_table_has_the_best_first_and_less_lora():
    def of(method, seed, share):
        run = Run(TASK, Member(method, 1e-3, seed=seed))
        return record(run, 1.0, accuracy=share)

    records = [of("lora", seed, 0.02 + seed / 1000) for seed in range(3)]
    records += [of("pissa", seed, 0.03 + seed / 1000) for seed in range(3)]
    found = rows(records)
    assert [row[0] for row in found] == ["pissa", "lora"]
    assert found[0][3:] == ["0.0310", "+0.0100 ± 0.0000"] and found[1][3] == "0.0210"
    assert math.isclose(float(found[0][2]), 1.0)
