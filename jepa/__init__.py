"""The science: modules and pure functions on tensors. No files, no video, no HDF5, no command line."""
