"""Patches for the hosts' own repositories, and the check that keeps them correct."""
