"""`kvlocal eval`: compares policies on the same chats."""

from contextlib import ExitStack
from pathlib import Path

import click

from kvlocal.conversations.dialogues import Data, load, shuffled
from kvlocal.errors import KvlocalError
from kvlocal.evaluation.dialogue import DialogueTask
from kvlocal.evaluation.recall import RecallTask
from kvlocal.evaluation.reference import ReferenceCache
from kvlocal.llama.library import load as load_library
from kvlocal_cli.evaluate import Run, run_options
from kvlocal_cli.evaluate_memory import gsm8k_command, memory_command
from kvlocal_cli.groups import CommandGroup
from kvlocal_cli.terminal import waiting

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group("eval", cls=CommandGroup)
def eval_group() -> None:
    """Compare policies: how much of a conversation is left in the compressed cache.

    Every policy reads the same chats. A run that was interrupted goes on when the same command is given again; other policies and ratios
    may then be asked for.
    """


for command in (memory_command, gsm8k_command):
    eval_group.add_command(command)


@eval_group.command("dialogue")
@click.option("--data", "data_path", type=_FILE, required=True, metavar="FILE",
              help='Dialogues, one JSON object a line: {"history": [{"user", "bot"}]} (MT-Bench-101) or {"messages": [{"role", "content"}]}.')
@click.option("--concat", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Dialogues joined into one chat.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Take N dialogues, chosen by the seed.  [default: all]")
@click.option("--by", metavar="FIELD",
              help="Also give all by a field of the dialogue that the last turn is from, such as task (MT-Bench-101) or method (SafeDialBench).")
@click.option("--full-without-lora", is_flag=True,
              help="Compare with the full context of the model without the adapters of --lora. The policy full then says what they change there.")
@run_options
def dialogue_command(run: Run, data_path: Path, concat: int, limit: int | None, by: str | None, full_without_lora: bool) -> None:
    """Measure how far predictions move when the history is compressed.

    The history of each chat is read turn by turn with compression on; then the last turn is read, its answer given, and what the model
    predicts for each token of it is compared with what it predicts with the full context. Of answers longer than 256 tokens the first 256
    are taken. Chats that are longer than the model's trained context are left out.

    \b
    kl             KL(full || compressed), mean per token, in nats
    agreement      how often both contexts find the same token most likely
    cross_entropy  of the answer, mean per token, in nats
    removed        share of the history's cells that were really removed
    """
    data = load(data_path)
    fields = dict.fromkeys(name for dialogue in data.dialogues for name in dialogue.labels)
    if by is not None and by not in fields:
        has = f"they have {', '.join(fields)}" if fields else "they have no field with a text"
        raise KvlocalError(f"no dialogue in {data_path} has a field {by!r} with a text to be told apart by: {has}")
    with ExitStack() as opened:
        model = opened.enter_context(run.loaded())
        reference = opened.enter_context(run.without_lora(model)) if full_without_lora and model.changed_by else model
        dialogues = shuffled(data.dialogues, run.seed)[:limit]
        depends: dict[str, object] = {"llama.cpp": load_library().bindings_version, "model": run.fingerprint}
        depends["types"] = [run.base.type_k, run.base.type_v]
        if reference.changed_by:
            depends["lora"] = reference.changed_by
        with waiting("reading the dialogues"):
            task = DialogueTask(model, run.base, dialogues, concat, ReferenceCache(run.cache), depends, run.nexus, by, reference)
        left_out = {"empty": data.n_empty, "too_long": task.n_too_long, "without_history": task.n_without_history}
        run.note(data.n_empty, "dialogue", "left out because a text is empty or there is no answer")
        run.note(task.n_too_long, "chat", f"left out as too long for a model trained on {model.n_ctx_train} tokens")
        run.note(task.n_without_history, "chat", "left out because nothing comes before the last turn")
        own = {"full_without_lora": True} if full_without_lora else {}
        run.measure(task, {**_source(data_path, data), "concat": concat, "limit": limit, **({"by": by} if by else {}), **own}, left_out)


@eval_group.command("recall")
@click.option("--data", "data_path", type=_FILE, metavar="FILE",
              help="Dialogues for the talk between the facts, as for eval dialogue.  [default: generated]")
@click.option("--questions", type=click.IntRange(min=1), default=200, show_default=True, metavar="N", help="Questions in all, 8 to a chat.")
@click.option("--tokens", type=click.IntRange(min=1), default=1500, show_default=True, metavar="N", help="Length of a chat's history.")
@run_options
def recall_command(run: Run, data_path: Path | None, questions: int, tokens: int) -> None:
    """Measure how well facts from early turns are recalled from the compressed cache.

    Chats are generated from the seed: the user states facts (names, numbers, dates, places, preferences, code words, corrections of something
    said before), talks about other things, and asks about every fact in the end.

    \b
    choice         share of questions where the right answer is more likely than three others of its kind
    greedy         share of questions where the answer that the model writes names the right value, and no other
    removed        share of the history's cells that were really removed

    Both are also given by the tokens between the fact and the end of the history.
    """
    data = load(data_path) if data_path else None
    with run.loaded() as model:
        with waiting("making the chats"):
            task = RecallTask(model, run.base, questions, tokens, run.seed, data.dialogues if data else (), run.nexus)
        run.measure(task, {**(_source(data_path, data) if data_path and data else {}), "questions": questions, "tokens": tokens}, {})


def _source(path: Path, data: Data) -> dict[str, str]:
    return {"data": path.name, "data_sha256": data.digest}
