"""What commands share: options, the folder, the run of a trainer, the one embedder, tables and the map."""
