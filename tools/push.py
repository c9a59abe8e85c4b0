"""See `megaprune push --help`."""

from megaprune.cli.main import main

if __name__ == "__main__":
    main("push")
