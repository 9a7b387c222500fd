"""Groups of commands, and commands whose arguments are texts."""

import re

import click

_NUMBER = re.compile(r"-\.?\d")  # how no option begins


class CommandGroup(click.Group):
    """A group that shows its help where no command is named and it does nothing by itself, and that is no failure."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not self.invoke_without_command and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()
        return super().parse_args(ctx, args)


class TextCommand(click.Command):
    """A command that takes a negative number for a text, and not for an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with_value = {name for param in self.params if isinstance(param, click.Option) and not param.is_flag for name in param.opts}
        end = args.index("--") if "--" in args else len(args)
        numbers = [i for i in range(end) if _NUMBER.match(args[i]) and not (i and args[i - 1] in with_value)]
        if numbers:
            others = [arg for i, arg in enumerate(args[:end]) if i not in numbers]
            args = [*others, "--", *(args[i] for i in numbers), *args[end + 1 :]]
        return super().parse_args(ctx, args)
