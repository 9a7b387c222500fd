"""The command `kvlocal`: click commands over the library."""
