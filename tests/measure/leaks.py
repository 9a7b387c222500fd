"""Does what kvlocal does with its libraries a few times, under LeakSanitizer, and tells what memory of theirs nothing points to in the end.

    make leaks

Python never frees much of what it allocates. So only what was allocated in libllama, ggml or libkvlocal-chat counts, for which LeakSanitizer's report
is read.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from doors import CHATML, write_chat_model, write_nexus

from kvlocal.llama.adapter import Adapter
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.context import Context
from kvlocal.llama.errors import EngineError, NativeError
from kvlocal.llama.model import Model
from kvlocal.template.compiled import AnswerError, CompiledTemplate, TemplateError

ROUNDS = 3
_OURS = re.compile(r"\blib(llama|ggml|kvlocal-chat)[\w-]*\.so|/native/(src|chat)/")
# enough for llama.cpp to take it for a template of gpt-oss
_CHANNELS = "{% for m in messages %}<|start|>{{ m.role }}<|channel|>final<|message|>{{ m.content }}<|end|>{% endfor %}<|start|>assistant"
# what stands in a stack above the functions of the library that Python calls
_CALLER = re.compile(r"libffi|_cffi|python")


def work(directory: Path) -> None:
    """One round, also with what is refused."""
    for family in ("llama", "gemma3"):
        path = directory / f"{family}.gguf"
        with Model(path) as model:
            adapter = Adapter(model, directory / "adapter.gguf") if family == "llama" else None
            for _ in range(ROUNDS):
                with Context(model, n_cells=256, n_ubatch=32, n_seq_max=2, n_threads=1) as context:
                    _work_in(context, adapter)
        for wrong in (directory / "cut.gguf", directory / "adapter.gguf"):
            with contextlib.suppress(EngineError):
                Model(wrong)


def answer() -> None:
    """One round with a chat template, also with what is refused."""
    messages = [{"role": "user", "content": "Hi"}]
    template = CompiledTemplate(CHATML)
    template.render(messages, opening=True, now=0)
    answers = template.answer_format(messages)
    for is_partial in (True, False):
        answers.parse("<think>\nHm.\n</think>\n\nYes.", is_partial=is_partial)
    channels = CompiledTemplate(_CHANNELS).answer_format(messages)
    for refused in (
        lambda: CompiledTemplate("{% for %}"),
        # not what takes all memory: the sanitizer's own operator new does not stop that
        lambda: CompiledTemplate("{{ raise_exception('no') }}").render(messages, opening=False, now=0),
        lambda: channels.parse("<|channel|>nothing of the sort"),
    ):
        try:
            refused()
        except (TemplateError, AnswerError):
            continue
        raise AssertionError("taken, though it is wrong")


def _work_in(context: Context, adapter: Adapter | None) -> None:
    cache = NativeCache(context.pointer, 1)
    cache.enable_ring(16)
    for start in range(0, 96, 32):
        context.decode(np.arange(start, start + 32), start, seq=1)
    if adapter:
        context.use_adapter(adapter)
        context.decode(np.arange(4), 96, seq=1)
        context.use_adapter(None)
    for on in (False, True):
        cache.enable_attention(on)
        context.decode([7], context.pos_max(1) + 1, seq=1)
    layout, n_cells = cache.layout(), cache.n_cells()
    for portable in (False, True):
        cache.scores(portable=portable)
        cache.redundancy(portable=portable)
    cache.attention_map([0])
    cache.read_keys(0), cache.read_values(0), cache.read_queries(0)
    state, ring = context.state_get(1), cache.ring_state()
    shape = (layout.n_layer, layout.n_head_kv, 64)
    keep = np.broadcast_to(np.arange(n_cells - 64, n_cells), shape)
    cache.remove(np.array([3, 5]))
    rows = cache.read_rows(np.arange(8, 72))
    cache.compact(keep, np.arange(64), np.full(shape, 64 - n_cells))
    for portable in (False, True):
        cache.compact(np.broadcast_to(np.r_[64:96, 0:32], shape), np.arange(64), np.full(shape, 1), rows=rows, portable=portable)
    cache.shift_beside(64 - n_cells)
    context.state_set(1, state)
    cache.set_ring_state(ring)
    for refused in (
        lambda: context.state_set(1, state[: len(state) // 2]),
        lambda: cache.set_ring_state(ring[:-1]),
        lambda: cache.attention_map([99]),
        lambda: cache.compact(keep + 1000, np.arange(64)),
        lambda: cache.compact(keep + 1000, np.arange(64), rows=rows),
        lambda: cache.read_rows(np.array([1000])),
        lambda: cache.remove(np.array([3, 3])),
    ):
        try:
            refused()
        except (EngineError, NativeError):
            continue
        raise AssertionError("taken, though it is wrong")


def leaks(report: str) -> Iterator[str]:
    """The leaks of the library in a report of LeakSanitizer."""
    for leak in re.split(r"\n\n", report):
        frames = re.findall(r"^ +#\d+ .*$", leak, re.MULTILINE)
        called = next((i for i, frame in enumerate(frames) if _CALLER.search(frame)), len(frames))
        if any(_OURS.search(frame) for frame in frames[:called]):
            yield leak


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for family in ("llama", "gemma3"):
            write_chat_model(directory / f"{family}.gguf", family=family, n_layer=6)
        write_nexus(directory / "adapter.gguf", directory / "llama.gguf")
        (directory / "cut.gguf").write_bytes((directory / "llama.gguf").read_bytes()[:-1000])
        options = f"{os.environ.get('ASAN_OPTIONS', '')}:detect_leaks=1:fast_unwind_on_malloc=0:exitcode=0:log_path={directory}/report"
        subprocess.run([sys.executable, __file__, directory], env=os.environ | {"ASAN_OPTIONS": options}, check=True)
        reports = [path.read_text(encoding="utf-8", errors="replace") for path in directory.glob("report.*")]
    if not any("LeakSanitizer: detected memory leaks" in report for report in reports):
        # Python leaves some, so there was no check
        sys.exit("".join(reports) or "LeakSanitizer did not report: run this with `make leaks`")
    found = [leak for report in reports for leak in leaks(report)]
    print("\n\n".join(found) or "nothing of the library's is lost")
    sys.exit(bool(found))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(Path(sys.argv[1]))
        for _ in range(ROUNDS):
            answer()
    else:
        main()
