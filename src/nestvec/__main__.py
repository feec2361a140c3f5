"""``python -m nestvec`` is the command line."""

from nestvec.cli import main

if __name__ == "__main__":
    main()
