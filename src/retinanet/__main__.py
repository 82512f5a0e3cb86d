"""`python -m retinanet` is the command `retinanet`."""

from retinanet.cli import main

if __name__ == "__main__":
    main()
