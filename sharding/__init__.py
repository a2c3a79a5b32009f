"""Meshes, rules and placement of OPT parameters over many devices."""
