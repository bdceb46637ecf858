"""What the `mymodels` script starts. It lies outside the package, as it has to run before the package is imported: see
`_is_command_line` in mymodels/__init__.py."""

started = False


def main() -> int:
    """Run the command line of this process and return the exit code."""
    global started
    started = True  # here and not above: a worker process imports the script again, and is no command line
    try:
        from mymodels.cli import main as run
    except KeyboardInterrupt:
        return 130
    return run()
