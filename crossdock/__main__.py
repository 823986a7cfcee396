"""`python -m crossdock` is the `crossdock` command; torchrun starts it so."""

from crossdock.launch.cli import main

if __name__ == "__main__":
    main()
