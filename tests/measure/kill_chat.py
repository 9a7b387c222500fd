"""Kills a chat at random moments and goes on with it, until its script is done; then nothing is missing and nothing is different.

    python tests/measure/kill_chat.py 200
    python tests/measure/kill_chat.py 200 --archive disk
    python tests/measure/kill_chat.py 50 --rpc

A greedy chat with compressions reads its turns from a pipe. Each process gets what remains of the script: how far it came is read from the
transcript, and a turn without a whole answer is answered with /regen first. After every kill, all that was shown must be in the transcript;
at the end its messages must be those of a chat that nobody disturbed. With --rpc the model is on an RPC server, and that is killed: the chat
has to end by itself, with a sentence. What it had of an answer is kept as one that ended with an error, and the chat goes on from that: the
answers behind it are others, and only what was asked is compared at the end.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rpc_process import RpcServer

from kvlocal.conversations.records import Conversation, TranscriptError
from kvlocal.conversations.transcript import Transcript
from kvlocal.hub.catalogue import DEFAULT_MODEL

SCRIPT = [
    "Name a bird that lives near the sea.",
    "The keeper of the lighthouse wrote down the weather, the ships and the birds of every single day. What did the keeper write down?",
    "Name a tree.",
    "My name is Ada and I live in a lighthouse with two cats and a dog. What would you ask me?",
    "Count from one to ten.",
    "Which animals live with me?",
    "Write a sentence about the weather, the ships and the birds that the keeper of the lighthouse saw on a rainy day in November.",
    "What is my name?",
]
OPTIONS = ["--temp", "0", "--max-tokens", "32", "--kv-budget", "96", "--stride", "32", "--threads", "1", "--system", "Be brief."]
REGEN = "/regen"
AT_ONCE = 0.2  # of the kills may come before the process has written anything


class Chat:
    """The chat as a process, which reads its turns from a pipe.

    session: the transcript
    lines: what it is given to read
    """

    def __init__(self, model: str, session: Path, lines: list[str]) -> None:
        command = [sys.executable, "-m", "kvlocal_cli", "chat", model, "--session", str(session), *OPTIONS]
        # files, which hold what was written whenever it was killed
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed in `end`
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self._out, stderr=self._err)
        self.process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        self.process.stdin.close()

    def wait_for_more(self, session: Path) -> None:
        """Waits until something is written to the transcript, or the process has ended."""
        size = session.stat().st_size if session.exists() else 0
        while self.process.poll() is None and (not session.exists() or session.stat().st_size == size):
            time.sleep(0.01)

    def end(self) -> tuple[str, str]:
        """Waits for its end; what it wrote to stdout and to stderr."""
        self.process.wait()
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
            file.close()
        return texts[0], texts[1]


def read(session: Path) -> Conversation:
    """What the transcript holds; nothing if it was not begun."""
    try:
        return Transcript.read(session)
    except TranscriptError:
        if session.exists() and session.read_bytes().count(b"\n"):
            raise
        return Conversation()


def whole(conversation: Conversation) -> list[dict[str, str]]:
    """The turns that have a whole answer."""
    messages = conversation.messages
    is_open = messages and (messages[-1]["role"] == "user" or len(messages) - 1 in conversation.cut_off)
    return messages[: -(2 - len(messages) % 2)] if is_open else messages


def remaining(conversation: Conversation) -> list[str]:
    """What of the script is still to be read."""
    n_asked = sum(message["role"] == "user" for message in conversation.messages)
    is_open = len(whole(conversation)) < len(conversation.messages)
    return [REGEN] * is_open + SCRIPT[n_asked:]


def missing(shown: str, before: Conversation, after: Conversation) -> str | None:
    """What a process showed that the transcript lacks."""
    n_before = len(whole(before))
    answers = [message["content"].rstrip("\n") + "\n" for message in after.messages[n_before:] if message["role"] == "assistant"]
    # with the line that a chat writes between two
    kept = "\n".join(answers)
    return None if kept.startswith(shown.rstrip("\n")) else shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--archive", choices=["off", "ram", "disk"], default="off")
    parser.add_argument("--rpc", action="store_true", help="put the model on an RPC server, and kill that")
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    args = parser.parse_args()
    OPTIONS.extend(["--archive", args.archive])
    rng, number = random.Random(args.seed), getattr(signal, f"SIG{args.signal}")

    server = RpcServer() if args.rpc else None
    if server:
        OPTIONS.extend(["--rpc", server.address])
    with tempfile.TemporaryDirectory() as directory:
        reference = Path(directory, "reference.jsonl")
        started = time.monotonic()
        chat = Chat(args.model, reference, SCRIPT)
        chat.end()
        seconds = time.monotonic() - started
        wanted = Transcript.read(reference).messages
        seconds *= 0.5  # of which a process spends much on starting
        counts = dict.fromkeys(("kills", "chats", "in_answers", "before_answers", "between_turns", "from_snapshot", "read_again"), 0)
        problems: list[str] = []
        while counts["kills"] < args.kills:
            session = Path(directory, f"{counts['chats']}.jsonl")
            while len(whole(read(session))) < len(wanted):
                before = read(session)
                if server and not server.running:
                    server = RpcServer(port=server.port)
                chat = Chat(args.model, session, remaining(before))
                killed = counts["kills"] < args.kills
                if killed:
                    if rng.random() > AT_ONCE:
                        chat.wait_for_more(session)
                    try:
                        chat.process.wait(timeout=rng.uniform(0, seconds))
                        killed = False
                    except subprocess.TimeoutExpired:
                        if server:
                            server.end(number)
                        else:
                            os.kill(chat.process.pid, number)
                shown, said = chat.end()
                after = read(session)
                if lost := missing(shown, before, after):
                    problems.append(f"shown and not in the transcript: {lost!r}")
                if whole(after)[: len(whole(before))] != whole(before):
                    problems.append("a whole turn is not what it was")
                counts["read_again"] += "read again" in said
                counts["from_snapshot"] += bool(before.messages) and "read again" not in said
                if killed:
                    counts["kills"] += 1
                    last = after.messages[-1]["role"] if after.messages else None
                    is_open = len(whole(after)) < len(after.messages)
                    counts["before_answers" if last == "user" else "in_answers" if is_open else "between_turns"] += 1
                    print(f"kill {counts['kills']}: {len(after.messages)} messages, {'open' if is_open else 'whole'}", file=sys.stderr)
                    # it may have been done when the server went
                    if server and (chat.process.returncode not in (0, 1) or not all(line.startswith("kvlocal: ") for line in said.splitlines())):
                        problems.append(f"it ended with {chat.process.returncode}: {said}")
                elif chat.process.returncode:
                    problems.append(f"it ended with {chat.process.returncode}: {said}")
            counts["chats"] += 1
            compared = slice(0, None, 2) if server else slice(None)
            if read(session).messages[compared] != wanted[compared]:
                problems.append(f"other messages: {read(session).messages}")
    if server and server.running:
        server.end()
    print(json.dumps({**counts, "problems": problems, "longest_wait": round(seconds, 1)}, indent=1))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
