"""Groups of commands."""

import click


class CommandGroup(click.Group):
    """A group that shows its help where no command is named, and that is no failure."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()
        return super().parse_args(ctx, args)
