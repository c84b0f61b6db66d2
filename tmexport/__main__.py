"""`python -m tmexport` is `tmexport`."""

from tmexport.cli import main

if __name__ == "__main__":
    main()
