"""Reports: how often the scores agree with the preferences, and how sure that is."""
