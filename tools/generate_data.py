"""See `megaprune generate-data --help`."""

from megaprune.cli.main import main

if __name__ == "__main__":
    main("generate-data")
