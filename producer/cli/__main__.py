"""``python -m nograd.producer.cli`` is ``nograd``."""

from . import main

if __name__ == "__main__":
    main()
