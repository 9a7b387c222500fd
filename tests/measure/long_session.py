"""One session of very many tokens with its archive on the disk: memory, going back, and coming back in another process.

    python tests/measure/long_session.py --tokens 100000 --archive-ram 200 --dir DIR

Long texts are read and answered by a few greedy tokens each, until the session is so long; it is saved as a chat saves it while the person types.
Then the last 20 turns are taken back, and their first is said again: its answer has to be the one of the first time. A second process comes back to
the saved session and answers what the first one is asked too: the same. Resident memory is told apart into what is the process's own and what are
pages of files, which the system takes away when it needs them.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from kvlocal.benchmark.script import Script
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.conversations.snapshot import Snapshots
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams

QUESTION = "What was the first thing that I told you about?"
LAST = 21  # turns that are short, so that taking 20 of them back is what a person would do


def memory() -> dict[str, float]:
    """MB of the process: its own, of files, and the most of both together."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile", "VmHWM")}


def said(chat: ChatSession, text: str) -> str:
    return "".join(chat.send(text))


def come_back(chat: ChatSession, snapshots: Snapshots, messages: list[dict[str, str]]) -> dict:
    started = time.perf_counter()
    n = snapshots.load(chat, messages)
    seconds = time.perf_counter() - started
    assert n == len(messages), "the session did not come back whole"
    before = memory()
    return {"seconds_to_come_back": seconds, "memory_after_coming_back": before, "answer": said(chat, QUESTION)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--kv-budget", type=int, default=1024)
    parser.add_argument("--archive-ram", type=int, default=200, help="MB")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dir", type=Path, required=True, help="an empty directory for the session")
    parser.add_argument("--back", action="store_true", help="only come back to the session that is there")
    args = parser.parse_args()
    config = SessionConfig(
        budget=args.kv_budget, archive="disk", archive_ram=args.archive_ram * 10**6, archive_dir=args.dir, max_tokens=16, n_threads=args.threads,
        sampling=SamplingParams(temperature=0),
    )  # fmt: skip
    snapshots, kept = Snapshots(args.dir / "session.snapshot"), args.dir / "messages.json"
    with Model(resolve(args.model)) as model, ChatSession(model, config) as chat:
        if args.back:
            print(json.dumps(come_back(chat, snapshots, json.loads(kept.read_text()))))
            return
        script, turn, empty = Script(model, 1), 0, memory()
        began, next_save = time.perf_counter(), 0
        while chat.kv.history_tokens < args.tokens - LAST * 90:
            said(chat, " ".join(script.turn(turn + i).text for i in range(30)))
            turn += 30
            if chat.kv.history_tokens >= next_save:
                snapshots.save(chat)
                next_save = chat.kv.history_tokens + args.tokens // 20
                print(f"{chat.kv.history_tokens} tokens, {memory()['RssAnon']:.0f} MB", file=sys.stderr)
        answers, before = [], dict(vars(chat.seconds))
        for i in range(LAST):
            answers.append(said(chat, script.turn(turn + i).text))
        last = {name: seconds - before[name] for name, seconds in vars(chat.seconds).items()}
        snapshots.save(chat)
        kept.write_text(json.dumps(chat.messages))
        result = {
            "tokens": chat.kv.history_tokens,
            "minutes": (time.perf_counter() - began) / 60,
            "share_of_recall": chat.seconds.recall / sum(vars(chat.seconds).values()),
            "share_of_recall_in_the_last_turns": last["recall"] / sum(last.values()),
            "memory_of_an_empty_session": empty,
            "memory": memory(),
            "archive_ram": args.archive_ram,
            "file_mb": sum(file.stat().st_size for file in args.dir.iterdir()) / 1e6,
        }
        began = time.perf_counter()
        chat.undo(LAST - 1)
        result["seconds_to_take_20_turns_back"] = time.perf_counter() - began
        result["answer_is_the_same_after_going_back"] = said(chat, script.turn(turn + 1).text) == answers[1]
        for i in range(2, LAST):
            said(chat, script.turn(turn + i).text)
        answer = said(chat, QUESTION)
    back = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--back"], capture_output=True, text=True, check=True)
    result |= json.loads(back.stdout.splitlines()[-1])
    result["answer_is_the_same_after_coming_back"] = result.pop("answer") == answer
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
