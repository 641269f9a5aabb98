"""`python -m bucketward`."""

from bucketward.cli import main

main()
