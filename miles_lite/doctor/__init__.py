"""Preflight: is this host, this cluster, this experiment fit to train?"""
