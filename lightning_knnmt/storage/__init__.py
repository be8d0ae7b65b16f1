"""Files that are whole or not there: names, checksums, sealed JSON, one writer at a time."""
