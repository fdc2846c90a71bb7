"""`python -m patchkit`: the same as `patchkit`, for launchers that start modules (`accelerate launch -m`)."""

from __future__ import annotations

from patchkit.cli import main

if __name__ == "__main__":
    main()
