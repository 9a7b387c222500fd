"""`kvlocal eval memory` and `kvlocal eval gsm8k`: questions that come late in conversations."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import click

from kvlocal.cache.config import DEFAULT_BUDGET
from kvlocal.conversations.dialogues import load
from kvlocal.evaluation.gsm8k import gsm8k_chats, load_problems
from kvlocal.evaluation.history import turn_tokens
from kvlocal.evaluation.memory import MemoryTask
from kvlocal.evaluation.memory_chats import MemoryChat
from kvlocal.evaluation.memory_data import load_memory
from kvlocal.evaluation.memory_generator import memory_chats
from kvlocal.llama.model import Model
from kvlocal.template.chat_template import ChatTemplate
from kvlocal_cli.evaluate import Run, run_options
from kvlocal_cli.terminal import waiting

_FILE = click.Path(dir_okay=False, path_type=Path)
_TOKENS, _CHATS = 20_000, 4  # of what is generated


@click.command("memory")
@click.option("--data", "data_path", type=_FILE, metavar="FILE",
              help="Conversations with questions, as one JSON list of LoCoMo's or LongMemEval's format.  [default: generated]")
@click.option("--limit", type=click.IntRange(min=1), metavar="N",
              help=f"Take N conversations, of a file those that the seed chooses.  [default: all of a file, {_CHATS} generated]")
@click.option("--questions", type=click.IntRange(min=1), metavar="N", help="Ask at most N questions of each, chosen by the seed.  [default: all]")
@click.option("--tokens", type=click.IntRange(min=1), metavar="N", help=f"Length of a generated conversation.  [default: {_TOKENS}]")
@click.option("--talk", "talk_path", type=_FILE, metavar="FILE",
              help="Dialogues for the talk between generated facts, as for eval dialogue.  [default: small talk]")
@partial(run_options, budget=DEFAULT_BUDGET)
def memory_command(run: Run, data_path: Path | None, limit: int | None, questions: int | None, tokens: int | None, talk_path: Path | None) -> None:
    """Measure what is left of a long conversation when questions about it come late.

    Conversations are read turn by turn with compression on, and every question is asked at the end. They may be longer than what the model was
    trained for: the full context and the KL to it are then left out. Generated ones state facts of four kinds (one fact, one that is told anew
    later, one that needs two turns, a date) between other talk.

    \b
    choice           share of questions where the right answer is more likely than all wrong ones
    reciprocal_rank  one over the place of the right answer among them
    nll              of the right answer, mean per token, in nats
    kl               KL(full || compressed) on the right answer, mean per token, in nats
    survival         share of the attention to the evidence that was in the cache when the answer began
    removed          share of the history's cells that were really removed

    Each is also given by category and by the tokens between the evidence and the end of the history.
    """
    if data_path and (tokens or talk_path):
        raise click.UsageError("--tokens and --talk are for generated conversations: leave them or --data out")
    data = load_memory(data_path, run.seed) if data_path else None
    talk = load(talk_path) if talk_path else None
    with run.loaded() as model:
        with waiting("reading the conversations" if data else "making the conversations"):
            if data:
                chats = _drawn(data.chats, limit, run.seed)
            else:
                template = ChatTemplate.from_model(model)
                chats = memory_chats(
                    limit or _CHATS,
                    tokens or _TOKENS,
                    run.seed,
                    lambda messages: [len(found) for found in turn_tokens(model, template, messages)],
                    talk.dialogues if talk else (),
                )
            if questions:
                chats = [chat.with_questions(questions, run.seed) for chat in chats]
            task = MemoryTask(model, run.base, chats, run.nexus)
        own: dict[str, Any] = {"limit": limit, "questions": questions}
        if data_path and data:
            own |= {"data": data_path.name, "data_sha256": data.digest}
            run.note(data.n_unanswerable, "question", "left out, which the conversation does not answer")
        else:
            own |= {"tokens": tokens or _TOKENS} | ({"talk_sha256": talk.digest} if talk else {})
        _note_too_long(run, task, model)
        run.measure(task, own, {"unanswerable": data.n_unanswerable if data else 0, "without_full_context": task.n_too_long})


def _drawn(chats: tuple[MemoryChat, ...], limit: int | None, seed: int) -> list[MemoryChat]:
    """So many of them, in an order that depends on the seed alone."""
    return random.Random(f"conversations {seed}").sample(chats, min(limit or len(chats), len(chats)))


@click.command("gsm8k")
@click.option("--data", "data_path", type=_FILE, required=True, metavar="FILE",
              help='Problems, one JSON object a line: {"question", "answer": "... #### 18"} (GSM8K).')
@click.option("--concat", type=click.IntRange(min=1), default=8, show_default=True, metavar="N", help="Problems told in one chat.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Take N problems, chosen by the seed.  [default: all]")
@run_options
def gsm8k_command(run: Run, data_path: Path, concat: int, limit: int | None) -> None:
    """Measure what is left of word problems that are told in turns.

    The sentences of several problems come in user turns, mixed, and what each of them asks for comes at the end. An answer is given as #### 18,
    and the wrong ones are the four numbers next to it. The metrics are those of eval memory; categories tell how many sentences a problem has.
    """
    data = load_problems(data_path)
    with run.loaded() as model:
        problems = random.Random(f"problems {run.seed}").sample(data.problems, min(limit or len(data.problems), len(data.problems)))
        with waiting("making the chats"):
            task = MemoryTask(model, run.base, gsm8k_chats(problems, concat, run.seed), run.nexus, "gsm8k")
        run.note(data.n_left_out, "problem", "left out, with a single sentence or an answer that is no whole number")
        _note_too_long(run, task, model)
        own = {"data": data_path.name, "data_sha256": data.digest, "concat": concat, "limit": limit}
        run.measure(task, own, {"not_in_turns": data.n_left_out, "without_full_context": task.n_too_long})


def _note_too_long(run: Run, task: MemoryTask, model: Model) -> None:
    why = f"too long for the full context of a model trained on {model.n_ctx_train} tokens: measured without it, and without the KL to it"
    run.note(task.n_too_long, "conversation", why)
