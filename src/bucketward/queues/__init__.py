"""One file per product; each is opened by URL through `OPENERS`."""
