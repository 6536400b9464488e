"""Bytes on disk <-> tensors: image folders, tar shards, code records, the order of samples, batches for one rank."""
