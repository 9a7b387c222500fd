"""`python -m kvlocal_cli` is `kvlocal`."""

from kvlocal_cli.main import main

main(prog_name="kvlocal")
