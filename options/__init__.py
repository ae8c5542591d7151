"""The command line and the YAML file."""
