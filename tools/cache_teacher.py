"""See `megaprune cache-teacher --help`."""

from megaprune.cli.main import main

if __name__ == "__main__":
    main("cache-teacher")
