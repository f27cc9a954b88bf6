"""``python -m longcat_sim``."""

from longcat_sim.cli import main

if __name__ == "__main__":
    main()
