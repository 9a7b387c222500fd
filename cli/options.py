"""The options of every command that holds a conversation, turned into one SessionConfig."""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_args

import click

from kvlocal import policies
from kvlocal.cache.archive import STORES, Store
from kvlocal.cache.compression import Positions
from kvlocal.cache.config import AUTO, DEFAULT_BUDGET, DEFAULT_FULL
from kvlocal.cache.fitting import READ_STRIDE, CannotRecall, check_file
from kvlocal.chat.config import SessionConfig
from kvlocal.doctor import memory_estimate
from kvlocal.doctor.memory_limits import available_memory
from kvlocal.errors import KvlocalError
from kvlocal.files.text import text_of
from kvlocal.hub.catalogue import DEFAULT_MODEL
from kvlocal.llama.adapter import Lora
from kvlocal.llama.context import KV_TYPES
from kvlocal.llama.free_cores import AUTO as FREE_CORES
from kvlocal.llama.free_cores import Threads
from kvlocal.llama.model import Model
from kvlocal.llama.placement import Placement
from kvlocal.llama.sampling import REPEAT_PENALTY, SamplingParams
from kvlocal.nexus.discovery import OFF, nexus_for
from kvlocal.nexus.tokens import NexusTokens
from kvlocal_cli import completing
from kvlocal_cli.device_options import DEVICE_OPTIONS, Where, take_devices
from kvlocal_cli.fetching import located
from kvlocal_cli.option_lists import add_options
from kvlocal_cli.sampling_options import SAMPLING_OPTIONS, take_sampling
from kvlocal_cli.settings import is_given
from kvlocal_cli.terminal import waiting

_SESSION = SessionConfig()
_SAMPLING = SamplingParams()


def _parse_policy_args(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    return dict(split_policy_arg(value) for value in values)


def split_policy_arg(text: str) -> tuple[str, str]:
    """`name=value` in two.

    Raises:
        click.BadParameter: it is not of that form.
    """
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise click.BadParameter(f"{text!r} is not of the form name=value")
    return name.replace("-", "_"), value


class SizeInBytes(click.ParamType):
    """A number of bytes such as 200M, 1.5G or 64MiB."""

    name = "size"
    _PREFIXES: ClassVar[dict[str, int]] = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises BadParameter if it is something else, or less than a byte."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) *([kmgt]?)(i?)b?", value.strip(), re.IGNORECASE | re.ASCII)
        if found is None or (found[3] and not found[2]):
            self.fail(f"{value!r} is no size such as 200M or 1.5G", param, ctx)
        n_bytes = int(float(found[1]) * (1024 if found[3] else 1000) ** self._PREFIXES[found[2].lower()])
        if not 1 <= n_bytes < 2**60:
            self.fail(f"{value!r} is no memory that a cache could have", param, ctx)
        return n_bytes


class NumberOfThreads(click.ParamType):
    """A number of threads, or auto."""

    name = "threads"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Threads:
        """Raises BadParameter if it is something else."""
        if value == FREE_CORES:
            return FREE_CORES
        n: int = click.IntRange(min=1).convert(value, param, ctx)
        return n


def parse_ratios(_ctx: click.Context, _param: click.Parameter, text: str) -> tuple[float, ...]:
    """`0.5,0.8` as numbers, each more than 0 and less than 1.

    Raises:
        click.BadParameter: it is something else.
    """
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        ratios = ()
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise click.BadParameter(f"{text!r} is not a list of numbers between 0 and 1 such as 0.5,0.8")
    return ratios


class LoraFile(click.ParamType):
    """A LoRA adapter, FILE or FILE:SCALE."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Lora:
        """Raises BadParameter if there is no such file, or its scale is no number."""
        if isinstance(value, Lora):
            return value
        try:
            return Lora.parse(value)
        except KvlocalError as error:
            self.fail(str(error), param, ctx)


lora_option = click.option(
    "--lora", multiple=True, type=LoraFile(), metavar="FILE[:SCALE]", shell_complete=completing.files,
    help="A LoRA adapter for the model, as GGUF, and how much of it: 1 unless said otherwise, 0 for nothing; can be repeated.",
)  # fmt: skip


_OPTIONS = (
    click.option(
        "--kv-budget", type=click.IntRange(min=1), metavar="N",
        help="Cells of the KV cache that each layer and head keeps.  "
        f"[default: {DEFAULT_BUDGET}; with --kv-ratio or the policy full as many as the model was trained for, up to {DEFAULT_FULL}]",
    ),
    click.option(
        "--kv-memory", type=SizeInBytes(), metavar="SIZE",
        help="Memory for the KV cache in place of --kv-budget, such as 200M or 1.5G: as many cells as fit in, of f16 if that holds all that "
        "the model was trained for, else of q8_0 unless --ctk or --ctv say otherwise.",
    ),
    click.option(
        "--kv-ratio", type=click.FloatRange(0, 1, max_open=True), metavar="X",
        help="Share of the conversation to remove, 0.8 keeps a fifth: the cache grows with it, up to --kv-budget.",
    ),
    click.option(
        "--policy", type=click.Choice(list(policies.POLICIES)),
        help="What to keep when the cache is over its budget.  "
        f"[default: {_SESSION.policy}, with share={policies.DEFAULT_SHARE} where there are Nexus tokens; without an archive "
        f"{policies.WITHOUT_ARCHIVE} where there are some, else {policies.WITHOUT_NEXUS}]",
    ),
    click.option(
        "--policy-arg", "policy_args", multiple=True, callback=_parse_policy_args, metavar="NAME=VALUE",
        help="A hyper-parameter of the policy; can be repeated.",
    ),
    click.option(
        "--stride", type=click.IntRange(min=1), default=_SESSION.stride, show_default=True, metavar="N",
        help="Cells over the budget at which the cache is compressed.",
    ),
    click.option(
        "--read-stride", type=click.IntRange(min=1), metavar="N",
        help=f"The same while a text is read, at least --stride.  [default: --stride; up to {READ_STRIDE} where the cells are on a GPU]",
    ),
    click.option(
        "--positions", type=click.Choice(get_args(Positions)), default=_SESSION.positions, show_default=True,
        help="Where kept keys are: at their original positions, at their place in the cache, or original until the trained context ends.",
    ),
    click.option(
        "--idle", type=click.Choice(["on", "off"]), default="on", show_default=True,
        help="Read finished turns again while you type, for the policies that score by it.",
    ),
    click.option(
        "--nexus", metavar="FILE", shell_complete=completing.files,
        help="Nexus tokens for the policies that use them, or off.  [default: a file for this model beside it, among the models, or shipped]",
    ),
    lora_option,
    click.option(
        "--archive", type=click.Choice(STORES),
        help=f"Keep what is removed in memory, or in memory and then in a file, and recall of it what is asked for.  "
        f"[default: {_SESSION.store} with the policy {_SESSION.policy}]",
    ),
    click.option(
        "--archive-ram", type=click.IntRange(min=0), metavar="MB",
        help="Memory that the archive may take.  [default: a quarter of what is free]",
    ),
    click.option(
        "--archive-dir", type=click.Path(file_okay=False, exists=True, writable=True, path_type=Path), metavar="DIR",
        help="Where the archive's file is, which has no name and ends with the program.  [default: the system's directory for temporary files]",
    ),
    click.option(
        "--archive-type", type=click.Choice(tuple(KV_TYPES)),
        help="Type of keys and values in the archive: a smaller one than the cache's takes less memory, and what is recalled is rounded to it.  "
        "[default: the types of the cache]",
    ),
    click.option("--system", metavar="TEXT", help="System prompt; it always stays in the cache."),
    click.option(
        "--temp", type=float, default=_SAMPLING.temperature, show_default=True, metavar="X",
        help="Temperature; 0 takes the most likely token.",
    ),
    click.option(
        "--top-k", type=int, default=_SAMPLING.top_k, show_default=True, metavar="N",
        help="Sample from the N most likely tokens; 0 is off.",
    ),
    click.option(
        "--top-p", type=float, default=_SAMPLING.top_p, show_default=True, metavar="X",
        help="Sample from the tokens that reach this probability together; 1 is off.",
    ),
    click.option(
        "--min-p", type=float, default=_SAMPLING.min_p, show_default=True, metavar="X",
        help="Drop tokens below this share of the most likely one; 0 is off.",
    ),
    click.option(
        "--repeat-penalty", type=float, metavar="X",
        help=f"Make recent tokens less likely; 1 is off.  [default: {REPEAT_PENALTY}, off with --temp 0]",
    ),
    *SAMPLING_OPTIONS,
    click.option("--seed", type=int, metavar="N", help="Seed of the random numbers.  [default: a random one]"),
    click.option(
        "--max-tokens", type=click.IntRange(min=1), default=_SESSION.max_tokens, show_default=True, metavar="N",
        help="Longest answer, in tokens.",
    ),
    click.option(
        "--ctk", "type_k", type=click.Choice(tuple(KV_TYPES)),
        help=f"Type of the keys in the cache.  [default: {_SESSION.type_k}; with --kv-memory what fits]",
    ),
    click.option(
        "--ctv", "type_v", type=click.Choice(tuple(KV_TYPES)),
        help=f"Type of the values in the cache.  [default: {_SESSION.type_v}; with --kv-memory what fits]",
    ),
    *DEVICE_OPTIONS,
    click.option(
        "--threads", type=NumberOfThreads(), metavar="N|auto",
        help="Threads; auto for one per core that other programs leave free.  [default: auto; with --seed or --temp 0, which are to give the same "
        "text again, one per core]",
    ),
    click.option("--yes", "-y", is_flag=True, help="Pull a model that is not on this machine yet without a question."),
)


class Loaded(NamedTuple):
    """A model, and what goes with it.

    config: as it was asked for, with the default policy that the model can have
    nexus: the Nexus tokens, if the policy uses them and there are some
    """

    model: Model
    config: SessionConfig
    nexus: NexusTokens | None


@dataclass(frozen=True)
class Loading:
    """How a command gets its model.

    where: on which devices it is put
    nexus: a Nexus file, OFF, or None for one that is found
    may_change_policy: whether the policy is a default, which a model that cannot recall, or one without Nexus tokens, has another of
    lora: adapters that it is used with
    may_pull: whether a model that is not here yet is fetched without a question
    may_add_nexus: whether the policy, where it recalls, has Nexus tokens beside if there are some
    """

    where: Where
    nexus: str | None
    may_change_policy: bool
    lora: Sequence[Lora] = ()
    may_pull: bool = False
    may_add_nexus: bool = False

    def locate(self, name: str) -> Path:
        """The file of the model of that name or path, which is pulled if it is not here yet and the person agrees.

        Raises:
            KvlocalError: there is none, or it cannot be pulled, or nobody can be asked.
            click.Abort: the person does not agree.
        """
        return located(name, self.may_pull)

    @contextmanager
    def loaded(self, name: str, config: SessionConfig, parallel: int = 1, undo: bool = True) -> Iterator[Loaded]:
        """The model of that name or path, if so many conversations with it, with undo or without, fit into memory.

        Raises:
            KvlocalError: there is none, it cannot be loaded, it takes too much memory, or a Nexus file or an adapter that was named cannot be used.
        """
        path = self.locate(name)
        try:
            placement = self.check(path, config, parallel, undo)
        except CannotRecall:
            if not self.may_change_policy:
                raise
            config = replace(config, policy=_without_archive(self.nexus))
            placement = self.check(path, config, parallel, undo)
        with waiting(f"loading {name}"):
            model = Model(path, placement=placement, lora=self.lora)
        with model:
            yield Loaded(model, *self._tokens(model, config))

    def check(
        self,
        path: Path,
        config: SessionConfig,
        parallel: int = 1,
        undo: bool = True,
        instead_of: SessionConfig | None = None,
        placement: Placement | None = None,
    ) -> Placement:
        """Whether the model of this file can have such a cache, and so many conversations with it, with undo or without, fit into the memory that
        is free, or that is once a conversation kept otherwise has ended. Returns where it is put.

        placement: where it is, if it is there already

        Raises:
            KvlocalError: they do not.
        """
        config = check_file(path, config, placement or self.where.placement)
        placement = placement or self.where.of(path, config, parallel, undo, self.lora)
        memory_estimate.check(path, config, parallel, undo, instead_of, self.lora, placement)
        return placement

    def takes_nexus(self, config: SessionConfig) -> bool:
        """Whether nothing was said of Nexus tokens, and a conversation of this configuration has them if there are some."""
        return self.may_add_nexus and config.policy == policies.DEFAULT_POLICY and "share" not in config.policy_args

    def _tokens(self, model: Model, config: SessionConfig) -> tuple[SessionConfig, NexusTokens | None]:
        wants = "nexus" in policies.make(config.policy, config.policy_args).needs
        # beside adapters only a named file is used (nexus_for), and nobody misses what was not asked for
        finds = self.nexus is not None or not model.changed_by
        if not (wants or (finds and self.takes_nexus(config))):
            return config, None
        with waiting("loading the Nexus tokens"):
            found = nexus_for(model, self.nexus, lambda text: click.echo(f"kvlocal: {text}", err=True))
        if found and not wants:
            config = replace(config, policy_args={**config.policy_args, "share": policies.DEFAULT_SHARE})
        elif wants and found is None and self.may_change_policy:
            policies.make(policies.WITHOUT_NEXUS, config.policy_args)
            config = replace(config, policy=policies.WITHOUT_NEXUS)
        return config, found


def _without_archive(nexus: str | None) -> str:
    """The default policy where there is no archive."""
    return policies.WITHOUT_NEXUS if nexus == OFF else policies.WITHOUT_ARCHIVE


def session_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a session to a command, which gets `config: SessionConfig` and `loading: Loading` of them."""

    @functools.wraps(command)
    def with_config(
        *args: Any,
        kv_budget: int | None,
        kv_memory: int | None,
        kv_ratio: float | None,
        policy: str | None,
        policy_args: dict[str, str],
        nexus: str | None,
        lora: tuple[Lora, ...],
        stride: int,
        read_stride: int | None,
        positions: Positions,
        idle: str,
        archive: Store | None,
        archive_ram: int | None,
        archive_dir: Path | None,
        archive_type: str | None,
        system: str | None,
        temp: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repeat_penalty: float | None,
        seed: int | None,
        max_tokens: int,
        type_k: str | None,
        type_v: str | None,
        threads: Threads,
        yes: bool,
        **others: Any,
    ) -> Any:
        more_sampling = take_sampling(others)
        try:
            where = take_devices(others)
            kept_as = archive_ram, archive_dir, archive_type
            wants_archive = archive in ("ram", "disk") or kept_as != (None, None, None)
            loading = Loading(where, nexus, policy is None and not wants_archive, lora, yes, may_add_nexus=policy is None)
            if policy is None:
                # keys that always move cannot be looked up
                recalls = archive in ("ram", "disk") or (archive is None and positions != "cache")
                policy = _SESSION.policy if recalls else _without_archive(nexus)
            policies.make(policy, policy_args)
            if kv_memory is not None and kv_budget is not None:
                raise click.UsageError("--kv-budget and --kv-memory say the same in two ways: give one of them")
            config = SessionConfig(
                budget=kv_budget,
                memory=kv_memory,
                ratio=kv_ratio,
                policy=policy,
                policy_args=policy_args,
                stride=stride,
                read_stride=read_stride,
                positions=positions,
                idle=idle == "on",
                system=system,
                type_k=type_k or (_SESSION.type_k if kv_memory is None else AUTO),
                type_v=type_v or (_SESSION.type_v if kv_memory is None else AUTO),
                n_threads=threads or (FREE_CORES if seed is None and temp else None),
                sampling=SamplingParams(temp, top_k, top_p, min_p, repeat_penalty, seed=seed, **more_sampling),
                max_tokens=max_tokens,
                archive=archive,
                archive_ram=default_archive_ram() if archive_ram is None else archive_ram * 10**6,
                archive_dir=archive_dir,
                archive_type=archive_type,
            )
            if config.store == "off" and kept_as != (None, None, None):
                raise click.UsageError(
                    "--archive-ram, --archive-dir and --archive-type say how an archive is kept and there is none here: leave them out, "
                    "or give --archive disk"
                )
        except KvlocalError as error:
            # wrong without regard to any model
            raise click.UsageError(str(error)) from error
        return command(*args, config=config, loading=loading, **others)

    return add_options(with_config, _OPTIONS)


def model_named(name: str | None, model: str | None) -> tuple[str | None, str]:
    """The model that the command line names, None if it names none, and the one for a conversation that has none of its own.

    Args:
        name: of the argument.
        model: of the option --model, which may be from a variable or the config file.

    Raises:
        click.UsageError: the command line names two.
    """
    if model is None or not is_given("model"):
        return name, name or model or DEFAULT_MODEL
    if name is not None:
        raise click.UsageError("the model is named twice: leave one of the two out")
    return model, model


def default_archive_ram() -> int:
    """Bytes of memory for the archive, if nobody says how many: a quarter of what is free, where the system tells."""
    free = available_memory()
    return _SESSION.archive_ram if free is None else free // 4


def clean_text(text: str) -> str:
    """The text of an argument, which Python gives half surrogate pairs for bytes that are not UTF-8."""
    return text_of(text.encode("utf-8", "replace"))
