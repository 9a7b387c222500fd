"""`kvlocal batch --ray`: what a command line asks for, as workers on other machines can have it."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import click

from kvlocal.batch.workplace import Workplace
from kvlocal.chat.config import SessionConfig
from kvlocal.errors import KvlocalError
from kvlocal.hub.catalogue import Catalogue
from kvlocal.nexus.discovery import OFF
from kvlocal_cli.options import Loaded, Loading, default_archive_ram
from kvlocal_cli.terminal import say_base_model


@dataclass(frozen=True)
class LoadingThere:
    """Loads the model of a command in a worker, on whatever machine that is.

    loading, name, config, parallel: as for Loading.loaded
    chooses_ram: whether the memory for archives is what is free there and not what the configuration says
    """

    loading: Loading
    name: str
    config: SessionConfig
    parallel: int
    chooses_ram: bool

    def __call__(self, n_threads: int) -> AbstractContextManager[Loaded]:
        config = replace(self.config, n_threads=n_threads)
        if self.chooses_ram:
            config = replace(config, archive_ram=default_archive_ram())
        return self.loading.loaded(self.name, config, self.parallel, undo=False)


@contextmanager
def on_ray(
    address: str,
    n_workers: int | None,
    loading: Loading,
    name: str,
    config: SessionConfig,
    parallel: int,
    tell: Callable[[str], None],
    poll: Callable[[], None],
) -> Iterator[tuple[Workplace, str]]:
    """The workers of a cluster, and the key of their settings.

    Raises:
        KvlocalError: Ray is not installed, or what OnRay raises.
    """
    try:
        from kvlocal.batch.on_ray import OnRay
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise KvlocalError("kvlocal batch --ray needs Ray, which is not installed: pip install 'kvlocal[ray]'") from error
    chooses_ram = click.get_current_context().params["archive_ram"] is None
    load = LoadingThere(_with_whole_paths(loading), _whole_name(name), _with_whole_directory(config), parallel, chooses_ram)
    # where Ray writes what happens on the cluster, and results may go
    n_threads = config.n_threads if isinstance(config.n_threads, int) else None
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), OnRay(
        address, load, parallel=parallel, n_workers=n_workers, n_threads=n_threads, use_gpu=loading.where.uses_devices, tell=tell, poll=poll
    ) as workplace:
        if not workplace.has_template:
            say_base_model(name)
        yield workplace, workplace.settings


# A worker runs in another directory.


def _whole_name(name: str) -> str:
    """What a MODEL argument means in any directory, and without this machine's aliases."""
    catalogue = Catalogue.load()
    meant = catalogue.meant(name)
    is_name = catalogue.is_name(meant)
    looks_like_file = os.path.dirname(meant) or meant.lower().endswith(".gguf") or os.path.isfile(meant)
    return os.path.abspath(os.path.expanduser(meant)) if looks_like_file and not is_name else meant


def _with_whole_paths(loading: Loading) -> Loading:
    nexus = loading.nexus if loading.nexus in (None, OFF) else os.path.abspath(loading.nexus)
    return replace(loading, nexus=nexus, lora=tuple(replace(each, path=Path(os.path.abspath(each.path))) for each in loading.lora))


def _with_whole_directory(config: SessionConfig) -> SessionConfig:
    return config if config.archive_dir is None else replace(config, archive_dir=Path(os.path.abspath(config.archive_dir)))
