"""Arms of an experiment, which differ in their data alone: planned, trained and compared."""
