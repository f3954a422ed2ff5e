"""Local training: from a dataset and a plan to an update, in this process or in a child."""
