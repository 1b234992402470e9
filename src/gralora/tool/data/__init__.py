"""What a run trains on: files (readers, sources) become rows, tokens (examples, packing) and a corpus."""
