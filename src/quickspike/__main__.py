"""`python -m quickspike` is the command `quickspike`."""

from quickspike.cli import main

if __name__ == "__main__":
    main()
