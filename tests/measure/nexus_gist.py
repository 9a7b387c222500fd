"""Whether a turn of which only Nexus tokens are left can still be told: a summary of the chat has to name its first topic.

    python tests/measure/nexus_gist.py --nexus models/smollm2-135m.nexus.gguf

Sixteen chats begin with a question about something, go on with other short ones, and end with the request for a summary. The same chats are
held with all cells, and with `streaming`, which keeps nothing of the first turn but what is still recent. What was left of the first turn is
printed with each answer: cells of the question, of the answer, and Nexus cells.
"""

import argparse
from pathlib import Path

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal.nexus.tokens import NexusTokens

# what is asked about, and the word that the summary has to hold
TOPICS = {
    "volcanoes": "volcano", "bread": "bread", "chess": "chess", "whales": "whale", "the moon": "moon", "bicycles": "bicycle", "roses": "rose",
    "violins": "violin", "coffee": "coffee", "penguins": "penguin", "glass": "glass", "rice": "rice", "trains": "train", "honey": "honey",
    "castles": "castle", "rivers": "river",
}  # fmt: skip
OTHERS = ("How much is 12 plus 30?", "What is a good name for a dog?")
REQUEST = "Please summarize our conversation."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--nexus", type=Path, required=True)
    parser.add_argument("--kv-budget", type=int, default=128)
    parser.add_argument("--stride", type=int, default=48)
    parser.add_argument("--compression", type=float, default=0.5, help="as the policy nexus takes it")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    with Model(resolve(args.model)) as model:
        nexus = NexusTokens(model, args.nexus)
        told = {}
        for policy in ("nexus", "streaming", "full"):
            arguments = {"compression": args.compression} if policy == "nexus" else {}
            budget = None if policy == "full" else args.kv_budget
            config = SessionConfig(
                budget=budget, stride=args.stride, policy=policy, policy_args=arguments, max_tokens=60,
                sampling=SamplingParams(temperature=0), n_threads=args.threads,
            )  # fmt: skip
            told[policy] = 0
            for topic, word in TOPICS.items():
                with ChatSession(model, config, nexus=nexus) as chat:
                    for text in (f"Tell me something about {topic}.", *OTHERS):
                        "".join(chat.send(text))
                    chat.finish_turn()
                    left = dict.fromkeys(("user", "assistant", "nexus"), 0.0)
                    for segment in chat.segments():
                        if segment.turn == 1:
                            left[segment.role] += segment.n_cells
                    summary = "".join(chat.send(REQUEST)).replace("\n", " ")
                found = word in summary.lower()
                told[policy] += found
                cells = ", ".join(f"{role} {n:.1f}" for role, n in left.items())
                print(f"{policy:<10}{topic:<12}{'yes' if found else 'no':<4}{cells}: {summary}", flush=True)
        print(", ".join(f"{policy} {n} of {len(TOPICS)}" for policy, n in told.items()))


if __name__ == "__main__":
    main()
