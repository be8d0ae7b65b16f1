"""What goes wrong with datastores and their indexes."""


class DatastoreError(RuntimeError):
    """A datastore is missing, damaged, or does not fit what it is used with."""
