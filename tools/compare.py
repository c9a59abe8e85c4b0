"""See `megaprune compare --help`."""

from megaprune.cli import main

if __name__ == "__main__":
    main("compare")
