"""What writes a datastore and its indexes: building, appending, removing, compacting, verifying, planning."""
