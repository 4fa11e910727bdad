"""`python -m shared.cli` is the `lorad` command."""

from shared.cli import main

if __name__ == "__main__":
    main()
