"""What every other package stands on: errors, files, settings, progress, processes, resume points, fingerprints."""
