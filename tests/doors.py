"""The doors that are fuzzed (see fuzzing)."""

import hashlib
import json
import math
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from fuzzing import SLOW, Door
from gguf import GGUFWriter, TokenType
from lora_file import write_lora
from tiny_model import N_EMBD, N_FF, N_VOCAB, write_tiny_model

from kvlocal.batch.line import Failure, Line
from kvlocal.batch.output import Results
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.conversations import dialogues
from kvlocal.conversations.records import Conversation
from kvlocal.conversations.saved_chat import load, save
from kvlocal.conversations.snapshot import SnapshotError, Snapshots
from kvlocal.conversations.transcript import Transcript
from kvlocal.errors import KvlocalError
from kvlocal.evaluation.gsm8k import load_problems
from kvlocal.evaluation.memory_data import load_memory
from kvlocal.gguf.container import Container
from kvlocal.llama.adapter import Lora
from kvlocal.llama.context import Context
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal.nexus.base import base_hash
from kvlocal.nexus.file import NexusFile
from kvlocal.template.chat_template import ChatTemplate
from kvlocal_cli.config_file import ConfigFile
from kvlocal_cli.main import main

NAMES = (
    "gguf", "model", "nexus", "adapter", "snapshot", "window snapshot", "transcript", "session", "results", "batch line", "dialogues",
    "conversations", "problems", "template", "config", "arguments",
)  # fmt: skip

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LOCOMO = {
    "conversation": {"session_1_date_time": "8 May", "session_1": [{"speaker": "Ada", "dia_id": "D1:1", "text": "I moved to Cork."}]},
    "qa": [{"question": "Where does Ada live?", "answer": "Cork", "evidence": ["D1:1"], "category": 4}],
}
LONGMEMEVAL = {
    "question_id": "q", "question_type": "multi-session", "question": "Where do I live?", "answer": "Cork", "haystack_dates": ["8 May"],
    "haystack_session_ids": ["s"], "haystack_sessions": [[{"role": "user", "content": "I moved to Cork.", "has_answer": True}]],
    "answer_session_ids": ["s"],
}  # fmt: skip
LONGER = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if loop.first and system %}<<{{ system }}>>{% endif %}"
    "[{{ m.role }}]{{ m['content'] | trim }}[/]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Who are you?"}]
QUESTIONS = ("The keeper wrote down the birds.", "Who wrote down what?", "And when?")
CHAT = SessionConfig(
    budget=64, policy="kvzip-snapkv", stride=16, n_ubatch=32, max_tokens=4, n_threads=1, sampling=SamplingParams(temperature=0)
)
JSON_WORDS = [
    b'"', b"{", b"}", b"[", b"]", b":", b",", b"null", b"NaN", b"1e999", b"-0", b"\\u0000", b"\\ud800", b"\xff", b"\n", b'"role"', b'"content"',
    b"[" * 3000, b"\xef\xbb\xbf", b"\r\n",
]  # fmt: skip
TEMPLATE_WORDS = [
    b"{{ ", b" }}", b"{% ", b" %}", b"{% for x in range(99999) %}", b"{% endfor %}", b"messages", b".__class__", b".__mro__", b"|attr('__init__')",
    b"{{ self }}", b"{{ cycler.__init__.__globals__ }}", b"{{ raise_exception(1) }}", b"{% include 'x' %}", b"{% set a = a ~ a %}",
    b"[0]", b" * 9999",
]  # fmt: skip
CONFIG = b'''# mine
[conversation]
kv-budget = 512
system = """Be
brief."""
stop = ["END", "two words"]

[chat]
idle = false
[eval.recall]
questions = 5
'''
CONFIG_WORDS = [b"[", b"]", b"[[chat]]", b"=", b'"""', b"{a = 1}", b"nan", b"1979-05-27", b"\\u0000", b"\xff", b"\n[eval]\n", b"-1", b"[" * 3000]
ARGUMENTS = [
    b"chat", b"run", b"batch", b"eval", b"bench", b"models", b"pull", b"doctor", b"nexus", b"info", b"--kv-budget", b"--kv-ratio", b"--policy",
    b"gkv", b"--policy-arg", b"alpha=2", b"--temp", b"nan", b"inf", b"-1", b"0", b"1e400", b"--json", b"--system", b"--help", b"--nope", b"-m",
    b"no-such-model", b"", b"/", b"--", b"-", b"\xff", b"--seed", b"99999999999999999999", b"--ctk", b"q8_0", b"--version", b"hf:", b"hf:a/b:c",
    b"--threads", b"--stride",
]  # fmt: skip


@contextmanager
def doors(directory: Path) -> Iterator[list[Door]]:
    """All of them; files are made in the directory."""
    model = directory / "model.gguf"
    write_chat_model(model)
    whole = model.read_bytes()
    nexus = directory / "seed.nexus.gguf"
    write_nexus(nexus, model)
    adapter = write_lora(directory / "seed.lora.gguf", model, ["blk.0.ffn_up.weight"])
    window = directory / "window.gguf"
    write_chat_model(window, family="gemma3", n_layer=6)
    transcript = _transcript(directory)
    snapshots = [_snapshot(path) for path in (model, window)]
    with (
        Elsewhere(load_models) as load_model,
        Elsewhere(load_adapters, model) as load_adapter,
        Elsewhere(resume_chats, model) as resume,
        Elsewhere(resume_chats, window) as resume_window,
    ):
        yield [
            Door("gguf", [whole], file_door(directory / "a.gguf", _container)),
            Door("model", [whole], file_door(directory / "b.gguf", load_model), focus=[range(whole.index(b"tokenizer.ggml.tokens"))]),
            Door("nexus", [nexus.read_bytes()], file_door(directory / "c.nexus.gguf", NexusFile.load)),
            Door("adapter", [adapter.read_bytes()], file_door(directory / "j.gguf", load_adapter)),
            Door("snapshot", snapshots[:1], sealed_door(directory / "f.snapshot", resume), focus=_beginnings(snapshots[0])),
            Door("window snapshot", snapshots[1:], sealed_door(directory / "g.snapshot", resume_window), focus=_beginnings(snapshots[1])),
            Door("transcript", [transcript, _saved(directory)], file_door(directory / "d.jsonl", load), JSON_WORDS),
            Door("session", [transcript], file_door(directory / "h.jsonl", _resume), JSON_WORDS),
            Door("results", [_results(directory)], file_door(directory / "i.jsonl", _take_over), JSON_WORDS),
            Door("batch line", [json.dumps({"id": 1, "messages": MESSAGES}).encode()], _line, JSON_WORDS),
            Door("dialogues", [_lines([{"messages": MESSAGES}] * 3), _lines([{"history": [{"user": "a", "bot": "b"}]}] * 3)],
                 file_door(directory / "e.jsonl", dialogues.load), JSON_WORDS),
            Door("conversations", [json.dumps([LOCOMO]).encode(), json.dumps([LONGMEMEVAL]).encode()],
                 file_door(directory / "m.json", load_memory), JSON_WORDS),
            Door("problems", [_lines([{"question": "Ann has two pens. How many?", "answer": "It is two. #### 2"}] * 3)],
                 file_door(directory / "p.jsonl", load_problems), JSON_WORDS),
            Door("template", [CHATML.encode(), LONGER.encode()], _template, TEMPLATE_WORDS),
            Door("config", [CONFIG], file_door(directory / "k.toml", lambda path: ConfigFile(main, path).check()), CONFIG_WORDS),
            Door("arguments", [b"\n".join((b"run", b"--kv-budget", b"64", b"no-such-model", b"Hello")), b"models"], _command(directory),
                 [b"\n" + word + b"\n" for word in ARGUMENTS], whole=False),
        ]  # fmt: skip


def file_door(path: Path, take: Callable[[Path], object]) -> Callable[[bytes], None]:
    """A door that takes a file."""

    def enter(data: bytes) -> None:
        path.write_bytes(data)
        take(path)

    return enter


def sealed_door(path: Path, take: Callable[[Path], object]) -> Callable[[bytes], None]:
    """A door that takes a file with its SHA-256 at the end. What is refused comes again with the right one, to get past it."""
    enter = file_door(path, take)

    def twice(data: bytes) -> None:
        try:
            enter(data)
        except KvlocalError:
            content = data[: -hashlib.sha256().digest_size]
            enter(content + hashlib.sha256(content).digest())

    return twice


def write_chat_model(target: Path, tokenizer: str = "gpt2", family: str = "llama", n_layer: int = 2) -> None:
    """The tiny model with a vocabulary of bytes and a chat template."""
    bare = target.with_suffix(".bare")
    write_tiny_model(bare, family, n_layer=n_layer)
    source = Container(bare)
    writer = GGUFWriter(target, family)
    for key, value in source.metadata.items():
        if key.startswith(f"{family}."):
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre("default")
    # byte-level BPE writes the bytes as printable characters; those from U+0100 on stand for the others
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    texts = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    special = ["<s>", "</s>"]
    tokens = [*special, *(texts[byte] for byte in range(256))][:N_VOCAB]
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (N_VOCAB - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHATML)
    for tensor in source.tensors.values():
        writer.add_tensor(tensor.name, tensor.values())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_nexus(target: Path, model: Path) -> None:
    rng = np.random.default_rng(0)
    halves = rng.standard_normal((2, N_EMBD)).astype(np.float16), rng.standard_normal((N_FF, 2)).astype(np.float16)
    table = rng.standard_normal((4, N_EMBD)).astype(np.float32)
    NexusFile(table, {"blk.0.ffn_up.weight": halves}, 2.0, "llama", "tiny", base_hash(Container(model)), (0.5, 0.8)).save(target)


def _container(path: Path) -> None:
    for tensor in Container(path).tensors.values():
        tensor.values()


def _lines(records: list[dict]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _transcript(directory: Path) -> bytes:
    path = directory / "seed.jsonl"
    with Transcript.open(path, model="m", system=None) as chat:
        for message in MESSAGES:
            if message["role"] == "user":
                chat.add_user(message["content"])
            else:
                chat.add_piece(message["content"])
                chat.end_answer("end")
        chat.add_undo()
        chat.add_system("Be brief.")
        chat.add_load(MESSAGES, "Be kind.")
        chat.add_clear()
        chat.add_user("Once more.")
        chat.add_piece("Well")
        return path.read_bytes()


def _saved(directory: Path) -> bytes:
    path = directory / "saved.json"
    save(path, Conversation(messages=MESSAGES, system="Be brief.", model="m", settings={}))
    return path.read_bytes()


def _resume(path: Path) -> None:
    """What is refused stays as it is; what is taken is what can be read, and a list of sessions says the same of it."""
    before = path.read_bytes()
    try:
        with Transcript.resume(path) as session:
            session.add_user("Once more.")
    except KvlocalError:
        assert path.read_bytes() == before
        raise
    found, skimmed = Transcript.read(path), Transcript.skim(path)
    assert found.messages[-1] == {"role": "user", "content": "Once more."} and len(skimmed.messages) == len(found.messages)


def _results(directory: Path) -> bytes:
    path = directory / "results.jsonl"
    with Results(path, "key") as results:
        for number in range(1, 4):
            results.wants(number, b"line")
            results.write(Failure(number, "a", KvlocalError("it is bad: mend it")))
    return path.read_bytes()


def _take_over(path: Path) -> None:
    """What is refused stays as it is; what is taken grows by whole lines."""
    before = path.read_bytes()
    try:
        with Results(path, "key") as results:
            n_lines = results.n_done
            if results.wants(9, b"line"):
                results.write(Failure(9, "a", KvlocalError("it is bad: mend it")))
                n_lines += 1
    except KvlocalError:
        # but for the number of the line that was asked for, which can be in it with another key
        assert path.read_bytes() == before or b'"line": 9' in before
        raise
    assert path.read_bytes().count(b"\n") == n_lines


def _chat(model: Model) -> ChatSession:
    return ChatSession(model, CHAT)


def _snapshot(path: Path) -> bytes:
    """Of a chat that was compressed, and whose last turn can be taken back."""
    with Model(path) as model, _chat(model) as chat:
        for question in QUESTIONS:
            "".join(chat.send(question))
        Snapshots(path.with_suffix(".snapshot")).save(chat)
        path.with_suffix(".json").write_text(json.dumps(chat.messages), encoding="utf-8")
        return path.with_suffix(".snapshot").read_bytes()


def _beginnings(data: bytes) -> list[range]:
    """The header of a snapshot, and of each array so much that it holds the cells' positions, but few of the keys and values."""
    header, _, _ = data.partition(b"\n")
    found, at = [range(len(header))], len(header) + 1
    for _, kind, shape in json.loads(header)["arrays"]:
        size = np.dtype(kind).itemsize * math.prod(shape)
        found.append(range(at, at + min(size, 1024)))
        at += size
    return found


def _line(data: bytes) -> None:
    Line.parse(1, data)


def _template(data: bytes) -> None:
    template = ChatTemplate(data.decode("utf-8", "replace"), bos_token="<s>", eos_token="</s>")
    template.user_turn(MESSAGES[:2], "Who are you?")


def _command(directory: Path) -> Callable[[bytes], None]:
    """A door that takes the arguments of the command, a line for each. There are no models, as a lonely word is a prompt for the default one."""
    env = {"KVLOCAL_MODELS_DIR": str(directory / "models"), "XDG_STATE_HOME": str(directory)}

    def enter(data: bytes) -> None:
        arguments = [part.decode("utf-8", "surrogateescape") for part in data.split(b"\n")]
        if any(argument in ("chat", "batch", "pull", "synth", "train") for argument in arguments):
            # these read, fetch or write; a word before them makes them an argument
            arguments.append("--nope")
        result = CliRunner().invoke(main, arguments, input="", env=env)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        if result.exit_code not in (0, 1, 2):
            raise AssertionError(f"exit code {result.exit_code}")
        if result.exit_code and "Traceback" in result.output:
            raise AssertionError(result.output)
        if result.exit_code:
            raise KvlocalError(f"exit code {result.exit_code}")

    return enter


class Elsewhere:
    """A function of this module, in a process of its own: a crash there is that of one input only.

    task: what makes the function, from the arguments; the function takes a path
    """

    def __init__(self, task: Callable[..., Callable[[Path], None]], *arguments: Path) -> None:
        self._command = [sys.executable, __file__, task.__name__, *map(str, arguments)]

    def __enter__(self) -> Callable[[Path], None]:
        self._start()
        return self._call

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
        )

    def _call(self, path: Path) -> None:
        """Raises KvlocalError with what the process was told, or AssertionError if it died or did not answer."""
        try:
            self._process.stdin.write(f"{path}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline() if select.select([self._process.stdout], [], [], SLOW)[0] else None
        except BrokenPipeError:
            answer = ""
        if answer is None:
            self._process.kill()
        if not answer:
            code = self._process.wait()
            self._start()
            raise AssertionError(f"no answer in {SLOW:.0f} s" if answer is None else f"the process ended with {code}")
        kind, text = json.loads(answer)
        if kind == "refused":
            raise KvlocalError(text)
        if kind == "wrong":
            raise AssertionError(text)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def load_models() -> Callable[[Path], None]:
    """Loads a model, reads its template, tokenizes a text and decodes a few tokens."""

    def load(path: Path) -> None:
        with Model(path) as model:
            ChatTemplate.from_model(model)
            model.detokenize(model.tokenize("Hi, W\u00f6rld!\n\U0001f600", parse_special=True))
            with Context(model, n_cells=256, n_ubatch=32, n_threads=1) as context:
                context.decode(np.arange(4, dtype=np.int32) % model.n_vocab, 0)
                context.logits()

    return load


def load_adapters(path: Path) -> Callable[[Path], None]:
    """Loads this model with an adapter, and decodes a few tokens."""

    def load(file: Path) -> None:
        with Model(path, lora=[Lora(file, 0.5)]) as model, Context(model, n_cells=256, n_ubatch=32, n_threads=1) as context:
            context.decode(np.arange(4, dtype=np.int32), 0)
            context.logits()

    return load


def resume_chats(path: Path) -> Callable[[Path], None]:
    """Brings the chat of `_snapshot` back, goes on with it, and takes its last turn back."""
    chat = _chat(Model(path))
    messages = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))

    def resume(file: Path) -> None:
        for go_on in (lambda: "".join(chat.send("And?")), chat.undo):
            chat.clear()
            try:
                Snapshots(file).load(chat, messages)
            except SnapshotError:
                assert not chat.messages
                "".join(chat.send("Hello"))
                raise
            except KvlocalError as error:
                raise AssertionError(f"{type(error).__name__}: {error}") from error
            try:
                go_on()
            except KvlocalError as error:
                # keys and values can be anything
                if "not numbers" not in str(error):
                    raise AssertionError(f"{type(error).__name__}: {error}") from error
                raise

    return resume


def _serve(task: str, *arguments: str) -> None:
    # whatever llama.cpp prints must not get between the answers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    take = globals()[task](*map(Path, arguments))
    for line in iter(sys.stdin.readline, ""):
        try:
            take(Path(line.rstrip("\n")))
            answer = ["accepted", ""]
        except KvlocalError as error:
            answer = ["refused", str(error)]
        except Exception as error:  # noqa: BLE001 - what it is is what is asked
            answer = ["wrong", f"{type(error).__name__}: {error}"]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
