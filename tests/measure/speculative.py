"""What speculative decoding would bring: how much of a draft a model accepts, and what checking it costs beside tokens one by one.

    python tests/measure/speculative.py --model smollm2-135m --layers 3,6,15,24 --drafts 2,4,8 --tokens 200

The draft is the model itself, cut to its first layers, or what stood last behind the same two tokens. A greedy answer is drawn, and at each token
it is asked how many of the next tokens the draft had said. A round costs a decode of the draft for each of its tokens, and one of the model
for all of them and one more; all are timed, as time that the process computes, with one thread. Told are tokens a round and the speed in relation to
tokens one by one.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shallow_model import write_shallow_model

from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.context import Context
from kvlocal.llama.model import Model
from kvlocal.template.chat_template import ChatTemplate

PROMPTS = (
    "Tell me a long story about a lighthouse keeper.",
    "Write a Python function that reads a CSV file and prints the sum of each column.",
    "List the planets of the solar system and say two sentences about each.",
    "Repeat this text word by word, twice: The old harbour lies behind the hill, and boats come in at dusk when the wind has turned to the south.",
)


def seconds(function: Callable[[], object], n: int = 15) -> float:
    """Of a call, the median."""
    times = []
    for _ in range(n):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return float(np.median(times))


def greedy(context: Context, start: int, n: int) -> list[int]:
    """The next n tokens behind what was decoded, which are decoded too but for the last."""
    found = [int(context.logits().argmax())]
    while len(found) < n:
        context.decode(found[-1:], start + len(found) - 1)
        found.append(int(context.logits().argmax()))
    return found


def by_ngrams(text: list[int], n: int) -> list[int]:
    """What stood last behind the last two tokens of a text."""
    for i in range(len(text) - 3, -1, -1):
        if text[i : i + 2] == text[-2:]:
            return text[i + 2 : i + 2 + n]
    return []


def accepted(draft: list[int], answer: list[int]) -> int:
    return next((i for i, (one, other) in enumerate(zip(draft, answer, strict=False)) if one != other), min(len(draft), len(answer)))


def rounds(n_of: Callable[[int], tuple[int, int]], n: int) -> tuple[int, int, int]:
    """Over an answer of n tokens: how many rounds, tokens that were drafted, and tokens that a round had."""
    at = n_rounds = n_drafted = 0
    while at < n - 1:
        drafted, taken = n_of(at)
        at, n_rounds, n_drafted = at + taken + 1, n_rounds + 1, n_drafted + drafted
    return n_rounds, n_drafted, at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--layers", default="3,6,15,24")
    parser.add_argument("--drafts", default="2,4,8")
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    source, drafts = resolve(args.model), [int(n) for n in args.drafts.split(",")]
    with Model(source) as model, Context(model, n_cells=1024, n_ubatch=256, n_threads=1) as context, tempfile.TemporaryDirectory() as folder:
        template = ChatTemplate.from_model(model)
        prompts, answers = [], []
        for prompt in PROMPTS:
            text = template.render([{"role": "user", "content": prompt}], opening=True)
            prompts.append(model.tokenize(text, parse_special=True).tolist())
            context.clear()
            context.decode(prompts[-1], 0)
            answers.append(greedy(context, len(prompts[-1]), args.tokens))
        at = context.pos_max() + 1

        def decode(other: Context, n: int) -> None:
            other.remove(0, at, -1)
            other.decode(np.arange(100, 100 + n), at, logits="all")

        one = seconds(lambda: decode(context, 1))
        cost = {n: seconds(lambda n=n: decode(context, n + 1)) / one for n in drafts}
        print(f"{args.model}: a token {1000 * one:.2f} ms; " + ", ".join(f"{n + 1} at once as {cost[n]:.2f}" for n in drafts))
        for layers in map(int, filter(None, args.layers.split(","))):
            path = Path(folder, "draft.gguf")
            write_shallow_model(source, path, layers, quantized=True)
            with Model(path) as small, Context(small, n_cells=1024, n_ubatch=256, n_threads=1) as draft:
                said: list[list[list[int]]] = []
                for prompt, answer in zip(prompts, answers, strict=True):
                    said.append([])
                    draft.clear()
                    draft.decode(prompt, 0)
                    for i in range(len(answer) - 1):
                        draft.decode(answer[i : i + 1], len(prompt) + i)
                        said[-1].append(greedy(draft, len(prompt) + i + 1, max(drafts)))
                        draft.remove(0, len(prompt) + i + 1, -1)
                at = draft.pos_max() + 1
                step = seconds(lambda draft=draft: decode(draft, 1)) / one
            report(f"{layers} layers, a token as {step:.2f}", drafts, cost, step, said, answers)
        ngrams = [
            [by_ngrams(prompt + answer[: i + 1], max(drafts)) for i in range(len(answer) - 1)]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        report("n-grams", drafts, cost, 0.0, ngrams, answers)


def report(
    name: str, drafts: list[int], cost: dict[int, float], step: float, said: list[list[list[int]]], answers: list[list[int]]
) -> None:
    for n in drafts:
        found = np.zeros((len(answers), 3), int)
        for k, (of_answer, answer) in enumerate(zip(said, answers, strict=True)):

            def n_of(at: int, of_answer: list[list[int]] = of_answer, answer: list[int] = answer, n: int = n) -> tuple[int, int]:
                drafted = of_answer[at][:n]
                return len(drafted), accepted(drafted, answer[at + 1 :])

            found[k] = rounds(n_of, len(answer))
        n_rounds, n_drafted, n_tokens = found.sum(axis=0)
        # rounds without a draft are tokens one by one
        spent = n_drafted * step + n_rounds + (cost[n] - 1) * n_drafted / n
        per_prompt = ", ".join(f"{tokens / number:.2f}" for number, _, tokens in found)
        print(f"  {name}: {n} drafted, {n_tokens / n_rounds:.2f} tokens a round ({per_prompt}), speed {n_tokens / spent:.2f}", flush=True)


if __name__ == "__main__":
    main()
