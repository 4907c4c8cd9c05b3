"""Trained models on disk: written whole, verified when read, loadable on any number of devices."""
