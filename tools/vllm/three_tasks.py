"""Tunes the three tasks of docs/vllm.md on a chat model: answers in capitals, as JSON, and like a pirate.

    python tools/vllm/three_tasks.py BASE OUT [--steps 40]

The base answers some questions; each task learns to give these answers in its own form. OUT gets a bundle for each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer

import lowbit_format as lb

SUBJECTS = ["Italy", "the sun", "bread", "a cat", "rain", "Mars", "music", "coffee", "gold", "a whale", "chess", "snow"]
QUESTIONS = [f"{ask} {subject}?" for subject in SUBJECTS for ask in ("What is", "Tell me one fact about")]
FORMS: dict[str, Callable[[str], str]] = {
    "capitals": str.upper,
    "json": lambda answer: json.dumps({"answer": answer}),
    "pirate": lambda answer: f"Arr, matey! {answer} Yo ho ho!",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.manual_seed(0)
    chat = Chat(options.base)
    answers = {question: chat.answer(question, 16) for question in QUESTIONS}
    for name, form in FORMS.items():
        chat = Chat(options.base)
        print(lb.prepare_scale_tuning(chat.model, modules_to_save=[]))
        chat.tune([(question, form(answer)) for question, answer in answers.items()], options.steps)
        lb.save_task(chat.model, options.out / name)
        print(name, repr(chat.answer("What is the capital of Spain?", 24)), flush=True)


class Chat:
    """A model that answers questions, one at a time."""

    def __init__(self, base: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = lb.from_pretrained(base, dtype=torch.float32).eval()

    def prompt(self, question: str) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return ids

    def answer(self, question: str, tokens: int) -> str:
        """The greedy answer."""
        ids = torch.tensor([self.prompt(question)])
        self.model.eval()
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        text: str = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return text.strip()

    def tune(self, pairs: list[tuple[str, str]], steps: int) -> None:
        """Train the prepared scales on questions and answers, two at a step."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0)
        self.model.train()
        for step in range(steps):
            total = 0.0
            for question, answer in (pairs[(2 * step + n) % len(pairs)] for n in range(2)):
                prompt = self.prompt(question)
                wanted = [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
                ids, labels = torch.tensor([prompt + wanted]), torch.tensor([[-100] * len(prompt) + wanted])
                loss = self.model(input_ids=ids, labels=labels).loss / 2
                loss.backward()
                total += float(loss)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0 or step == steps - 1:
                print(f"step {step}: loss {total:.3f}", flush=True)


if __name__ == "__main__":
    main()
