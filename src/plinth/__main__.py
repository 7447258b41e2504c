"""``python -m plinth``: the same as the command ``plinth``."""

from plinth.pipelines.cli.main import main

if __name__ == "__main__":
    main()
