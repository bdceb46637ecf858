"""The entry point of the `mymodels` script, outside the package because it must run before the package is imported: see
`_is_command_line` in mymodels/__init__.py."""

started = False


def main() -> int:
    """Run the command line of this process and return the exit code."""
    global started
    started = True  # not at import: worker processes import the script again, and are not the command line
    try:
        from mymodels.cli import main as run
    except KeyboardInterrupt:
        return 130
    return run()
