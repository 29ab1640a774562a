"""python -m phase2: the command line."""

from phase2.cli import main

if __name__ == "__main__":
    main()
