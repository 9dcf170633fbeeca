"""`python -m mobilesam` is the same program as `mobilesam`."""

from .cli import main

if __name__ == "__main__":
    main()
