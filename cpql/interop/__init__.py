"""Other libraries: a consistency actor in theirs, their data in ours."""
