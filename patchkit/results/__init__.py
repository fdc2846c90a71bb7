"""What a run returns, saves and loads: result objects, their files, and the directory a run lives in."""
