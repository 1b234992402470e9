"""Turn files into the data of a run: rows (readers, sources), examples, tokens and a corpus."""
