"""Answers to known prompts before and after training, and their score."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from sft.messages import Refused
from sft.model.load import without_adapter
from sft.model.weight_files import is_transformers_own


class Probe(TrainerCallback):
    """Lets the model answer known prompts before and after training, and scores the answers.

    Each row of the file is a conversation whose last message is the expected reply. An answer is right if its text in
    `<answer>` equals the expected one. Decoding is greedy, all rows in one batch. Every rank does the same, because
    under ZeRO-3 all must take part.

    Refused: a file that is empty or holds anything else.
    """

    def __init__(self, file: str, tokenizer: PreTrainedTokenizerBase):
        try:
            lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line]
            rows = [json.loads(line)["messages"] for line in lines]
            self.expected = [answer_in(messages[-1]["content"]) for messages in rows]
            self.questions = [messages[-2]["content"] for messages in rows]
            asked = [messages[:-1] for messages in rows]
            prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in asked]
        except Exception as error:  # a template may raise anything
            raise Refused(f"--probe_file {file}: not a jsonl of conversations ({type(error).__name__})") from error
        if not rows:
            raise Refused(f"--probe_file {file}: is empty")
        self.tokenizer = tokenizer
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        width = max(map(len, prompts))  # padded on the left, as generate wants it
        self.prompts = torch.tensor([[self.pad] * (width - len(p)) + p for p in prompts])
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        self.before: list[str] = []
        self.after: list[str] = []

    @torch.no_grad()
    def answers(self, model: torch.nn.Module, device: torch.device) -> list[str]:
        """The model's greedy answers, one a prompt."""
        training = model.training
        model.eval()
        replies = model.generate(
            input_ids=self.prompts.to(device),
            attention_mask=self.mask.to(device),
            max_new_tokens=128,
            do_sample=False,
            use_cache=is_transformers_own(without_adapter(model)),  # else the cache is of a class that is gone
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.pad,
        )[:, self.prompts.shape[1] :]
        model.train(training)
        return [answer_in(text) for text in self.tokenizer.batch_decode(replies, skip_special_tokens=True)]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.before = self.answers(model, args.device)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.after = self.answers(model, args.device)

    def results(self) -> dict[str, int]:
        """The figures for train_results.json: the number of prompts, and of right answers before and after."""
        answers = {"before": self.before, "after": self.after}
        right = {when: sum(map(str.__eq__, texts, self.expected)) for when, texts in answers.items()}
        return {"example_prompts": len(self.expected)} | {f"example_correct_{when}": n for when, n in right.items()}

    def print_some(self) -> None:
        """Show four prompts with the answers before and after, and the score."""
        score, step = self.results(), max(1, len(self.expected) // 4)
        for i in range(0, len(self.expected), step)[:4]:
            print(f"  {self.questions[i]}")
            for when, answers in (("before:", self.before), ("after: ", self.after)):
                start = " ".join(answers[i].split())[:30]
                print(f"    {when} {start or '(nothing)'}")
        print(
            f"Prompts of --probe_file answered exactly: {score['example_correct_before']} of "
            f"{score['example_prompts']} before training, {score['example_correct_after']} after",
            flush=True,
        )


def answer_in(reply: str) -> str:
    """The text inside <answer>…</answer>, or the whole reply where there is no such block."""
    return reply.rpartition("<answer>")[2].partition("</answer>")[0].strip()
