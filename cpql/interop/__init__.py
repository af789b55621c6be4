"""Other libraries: our actor in theirs, their data in ours."""
